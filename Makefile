# make run    set up, then notebooks 01-05 on MODEL at BUDGET into runs/$(RUN)/; run again to resume
# make test   set up, then ruff, pytest and nbval
MODEL ?= smollm2-135m
TEXT ?= wikipedia
BUDGET ?= 0.5
RUN ?= $(MODEL)-$(BUDGET)
BUDGETS ?= 0.75 0.5 0.34
PYTHON ?= python3

BIN := .venv/bin
DIR := runs/$(RUN)
NOTEBOOKS := 01_head_redundancy 02_head_clusters 03_head_fusion 04_continued_pretraining 05_compression_vs_perplexity
PARAMETERS = -p model $(MODEL) -p text $(TEXT) -p budget $(BUDGET) -p run_dir $(DIR)
# wiki-mha is small enough for the notebooks' own defaults; anything else gets longer blocks and fewer training tokens
ifneq ($(MODEL),wiki-mha)
PARAMETERS += -p length 512 -p calibration_blocks 8 -p validation_blocks 8
TRAINING = -p tokens 10240
endif

.PHONY: setup run sweep lab test test-slow clean
.DELETE_ON_ERROR:
.SECONDARY:

setup: .venv/ready

# torch first and alone: the rest must not bring in another build of it
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

run: $(NOTEBOOKS:%=$(DIR)/%.ipynb)
	$(BIN)/python -m dha_utils.runs $(DIR)

# A notebook appears under its name only when it is finished
define execute
	mkdir -p $(DIR)
	$(BIN)/papermill --cwd notebooks $(PARAMETERS) $(1) notebooks/$(notdir $@) $(DIR)/.partial-$(notdir $@)
	mv $(DIR)/.partial-$(notdir $@) $@
endef

$(DIR)/01_head_redundancy.ipynb: | setup
	$(call execute)
$(DIR)/02_head_clusters.ipynb: $(DIR)/01_head_redundancy.ipynb
	$(call execute)
$(DIR)/03_head_fusion.ipynb: $(DIR)/02_head_clusters.ipynb
	$(call execute)
$(DIR)/04_continued_pretraining.ipynb: $(DIR)/03_head_fusion.ipynb
	$(call execute,$(TRAINING))
	rm -rf $(DIR)/training
$(DIR)/05_compression_vs_perplexity.ipynb: $(DIR)/04_continued_pretraining.ipynb
	$(call execute)

# The papermill batch: one run folder a budget
sweep:
	for budget in $(BUDGETS); do $(MAKE) run MODEL=$(MODEL) TEXT=$(TEXT) BUDGET=$$budget || exit 1; done

lab: setup
	$(BIN)/jupyter lab notebooks

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest
	TQDM_DISABLE=1 $(BIN)/pytest --nbval notebooks

test-slow: setup
	$(BIN)/pytest -m slow

clean:
	rm -rf runs .venv
