# make run    set up, then notebooks 01-05 on MODEL at BUDGET into runs/$(RUN)/; run again to resume
# make report the decision for that run: notebook 06 as a page, runs/$(RUN)/report.html; make slides, make pdf
# make test   set up, then ruff, pytest (also under the newest transformers that is allowed) and nbval
MODEL ?= smollm2-135m
TEXT ?= $(if $(filter austen-mha,$(MODEL)),austen,wikipedia)
BUDGET ?= 0.5
# Instead of a budget: CACHE_BYTES=... a token, or MAX_INCREASE=0.05 of the perplexity
TARGET = $(if $(MAX_INCREASE),-p max_increase "$(MAX_INCREASE)") $(if $(CACHE_BYTES),-p cache_bytes "$(CACHE_BYTES)")
# Names of files and targets have no spaces, and no % for make
space := $(subst ,, )
plain = $(subst %,-percent,$(subst $(space),-,$(1)))
# DEVICE=cuda, DTYPE=bfloat16: without them a GPU if there is one; float32 on a CPU, elsewhere the checkpoint's own dtype
PLACE = $(if $(DEVICE),-r device "$(DEVICE)") $(if $(DTYPE),-r dtype "$(DTYPE)")
last = $(notdir $(patsubst %/,%,$(call plain,$(1))))
# A report on a model made elsewhere has a run folder of its own
CHECKPOINT ?= recovered
ELSEWHERE := $(filter-out model recovered,$(call plain,$(CHECKPOINT)))
RUN ?= $(call plain,$(call last,$(MODEL))-$(or $(call last,$(ELSEWHERE)),$(MAX_INCREASE:%=increase-%),$(CACHE_BYTES:%=bytes-%),$(BUDGET)))
$(if $(or $(word 2,$(RUN)),$(findstring %,$(RUN))),$(error RUN names a folder without spaces or % in it, not '$(RUN)'))
BUDGETS ?= 0.75 0.5 0.34
PYTHON ?= python3
# glibc: what a freed tensor of 32 MiB held goes back to the system; below that, as glibc does by itself in the end, or the
# time of decoding (notebook 05) would be that of asking the system for memory
export MALLOC_MMAP_THRESHOLD_ := 33554432

BIN := .venv/bin
DIR := runs/$(RUN)
# The ends of the range in pyproject.toml, and the tests of what leans on transformers
OLDEST := 5.23.0
NEWEST := 5.24.0
LEANING := tests/model/test_transformers.py tests/model/test_dha.py tests/model/test_cache.py tests/measure tests/fuse tests/recover tests/paper/test_linear.py \
	tests/test_dtypes.py
# Two tests at a time on one thread each: tiny models gain nothing from more
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope
NOTEBOOKS := 01_head_redundancy 02_head_clusters 03_head_fusion 04_continued_pretraining 05_compression_vs_perplexity
LENGTH := 256
PARAMETERS = -r model "$(MODEL)" -r text "$(TEXT)" -p budget "$(BUDGET)" -r run_dir $(DIR) -p length $(LENGTH) $(TARGET) $(PLACE)
# austen-mha is small enough for the notebooks' own defaults; anything else gets longer blocks and fewer of all that takes time
ifneq ($(MODEL),austen-mha)
LENGTH := 512
PARAMETERS += -p calibration_blocks 16 -p repeated 0.25 -p validation_blocks 8
SEARCH := -p search_steps 8
LEARNING := -p fusion_tokens 4096 -p evaluations 2
TRAINING := -p tokens 4096 -p evaluations 2 -p learning_rate 2e-4 -p pooled_learning_rate 5e-4
CHART := -y "budgets: [0.67, 0.5, 0.34]" -p context 4096
ASKING := -p documents 8 -p items 60 -p context 4096
endif

.PHONY: FORCE setup check run report slides pdf sweep site lab test test-slow test-versions test-under-$(OLDEST) test-under-$(NEWEST) notebooks clean
.DELETE_ON_ERROR:
.SECONDARY:

setup: .venv/ready

# torch first and alone: the rest must not bring in another build of it
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e .[dev]
	touch $@

run: $(NOTEBOOKS:%=$(DIR)/%.ipynb)
	@$(BIN)/python -m dha_utils table --run-dir $(DIR)

# Fetches the model, and says in one sentence what is wrong with a request
check: setup
	@$(BIN)/python -m dha_utils check $(PARAMETERS) $(SEARCH) $(LEARNING) $(TRAINING) $(CHART) \
		$(if $(filter report slides pdf site,$(MAKECMDGOALS)),$(REPORT),$(ASKING))

# A notebook appears under its name only when it is finished
define execute
	mkdir -p $(DIR)
	$(BIN)/papermill $(PARAMETERS) $(1) notebooks/$(notdir $@) $(DIR)/.partial-$(notdir $@)
	mv $(DIR)/.partial-$(notdir $@) $@
endef

$(DIR)/01_head_redundancy.ipynb: | check
	$(call execute)
$(DIR)/02_head_clusters.ipynb: $(DIR)/01_head_redundancy.ipynb
	$(call execute,$(SEARCH))
	rm -rf $(DIR)/search
$(DIR)/03_head_fusion.ipynb: $(DIR)/02_head_clusters.ipynb
	$(call execute,$(LEARNING))
	rm -rf $(DIR)/fusion $(DIR)/control
$(DIR)/04_continued_pretraining.ipynb: $(DIR)/03_head_fusion.ipynb
	$(call execute,$(TRAINING))
	rm -rf $(DIR)/training
$(DIR)/05_compression_vs_perplexity.ipynb: $(DIR)/04_continued_pretraining.ipynb
	$(call execute,$(CHART))

# The decision: notebook 06, its report and slides; SPEAK=ja for Japanese, ASK="-p items 400 ..." for its parameters,
# CHECKPOINT=my-dha for a model made elsewhere (by python -m dha_utils convert), which needs no run
SPEAK ?= en
CHROME ?= chromium
OTHER_TEXT ?= $(if $(filter wikipedia,$(TEXT)),austen,wikipedia)
REPORT = $(ASKING) -r language "$(SPEAK)" -r checkpoint "$(CHECKPOINT)" -r other_text "$(OTHER_TEXT)" $(ASK)
MADE_BY := $(if $(ELSEWHERE),,$(DIR)/$(if $(filter model,$(CHECKPOINT)),03_head_fusion,04_continued_pretraining).ipynb)
$(DIR)/06_decision_report.ipynb: $(MADE_BY) FORCE | check
	$(call execute,$(REPORT))
FORCE:
report slides: $(DIR)/06_decision_report.ipynb
	$(BIN)/python docs/report.py $<
pdf: report
	$(CHROME) --headless --no-sandbox --no-pdf-header-footer --print-to-pdf=$(DIR)/report.pdf $(DIR)/report.html

# The papermill batch: one run folder a budget
sweep:
	for budget in $(BUDGETS); do $(MAKE) run MODEL="$(MODEL)" TEXT="$(TEXT)" BUDGET=$$budget || exit 1; done

# README, the notebooks as executed on the tutorial model and in $(DIR), the studies and the API, into runs/site/html
site: run report
	$(BIN)/pip install -q -c constraints.txt -e .[site]
	$(BIN)/pip install -q --no-deps sphinx-mathjax-offline==0.0.2
	$(BIN)/papermill -r model "$(MODEL)" -p budget "$(BUDGET)" notebooks/00_start_here.ipynb $(DIR)/00_start_here.ipynb
	$(BIN)/python docs/pages.py $(DIR) runs/site/docs
	$(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

lab: setup
	$(BIN)/jupyter lab notebooks

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)
	$(MAKE) test-under-$(NEWEST)
	rm -rf runs/tutorial
	$(BIN)/pytest --nbval notebooks

test-versions: test-under-$(OLDEST) test-under-$(NEWEST)

# The environment as it is, with another transformers before its own
test-under-$(OLDEST) test-under-$(NEWEST): test-under-%: .venv/transformers-%/ready
	PYTHONPATH=$(<D) $(BIN)/python -c "import transformers; assert transformers.__version__ == '$*'"
	PYTHONPATH=$(<D) $(PYTEST) $(LEANING)

.venv/transformers-%/ready: .venv/ready
	$(BIN)/pip install -q --no-deps --upgrade --target $(@D) transformers==$*
	touch $@

# Execute the committed notebooks again, in place (no bars in their outputs)
notebooks: setup
	rm -rf runs/tutorial
	TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/0*.ipynb notebooks/studies/*.ipynb

test-slow: setup
	$(BIN)/pytest -m slow

clean:
	rm -rf runs .venv
