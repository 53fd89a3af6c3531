"""The model and the text of a study, and the CSV that its rows go to: a file never holds rows of two texts."""

from pathlib import Path

from dha_utils import load_checkpoint, load_text, token_blocks

RESULTS = Path(__file__).parent / "results"
OWN_TEXT = {"austen-mha": "austen"}  # of any other model: wikipedia


def add_inputs(parser, model, study):
    """The arguments `--model`, `--text` and `--out` of a study."""
    parser.add_argument("--model", default=model)
    parser.add_argument("--text", help="default: austen for austen-mha, else wikipedia")
    parser.add_argument("--out", type=Path, help=f"default: results/{study}_MODEL.csv beside this script")
    parser.set_defaults(study=study)


def parsed(parser):
    """The arguments of the command line, `text` and `out` filled in; another text than the model's own names the file."""
    arguments = parser.parse_args()
    name = Path(arguments.model).name
    own = OWN_TEXT.get(name, "wikipedia")
    arguments.text = arguments.text or own
    other = "" if arguments.text == own else f"_{Path(arguments.text).stem}"
    arguments.out = arguments.out or RESULTS / f"{arguments.study}_{name}{other}.csv"
    return arguments


def source_and_text(arguments, device=None):
    """(source, tokenizer, all blocks of the training text, `validation_blocks` of the validation text)."""
    source, tokenizer = load_checkpoint(arguments.model, device=device)
    training, validation = (
        token_blocks(tokenizer, load_text(arguments.text, split), arguments.length, limit)
        for split, limit in (("train", None), ("validation", arguments.validation_blocks))
    )
    return source, tokenizer, training, validation
