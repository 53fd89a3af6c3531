"""Sample the text `stories`: short stories in simple words, written by SmolLM2-135M-Instruct (Apache-2.0) to random orders.

    python data/sample_stories.py                     # hours on two cores; run again to resume
    python data/sample_stories.py --batches 2 --out runs/try

Each batch is a file of its own, decided by its number alone. When all are there, stories that are too short, go
round in circles or were told already are left out, and the rest is packed into `data/stories.jsonl.bz2`.
"""

import argparse
import bz2
import json
import os
import random
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from dha_utils import HeadPlan, fuse, load_checkpoint
from dha_utils.runs import write_whole

HERE = Path(__file__).parent
ORDER = "Write a short story in simple words about a {how} {who} named {name}, {where}, who {does} a {thing}."
WORDS = {
    "how": "brave shy kind lazy curious clever hungry lonely proud happy sad careful tiny old young greedy honest sleepy "
    "angry gentle funny stubborn poor rich quiet",
    "who": "boy girl rabbit fox bear cat dog bird mouse frog horse duck farmer baker king queen sailor teacher fisherman "
    "shepherd turtle owl squirrel pig cow goat wolf lion elephant monkey robot dragon giant fairy gardener miller painter",
    "name": "Lily Tom Ben Mia Sam Anna Max Lucy Jack Emma Leo Nina Tim Sara Finn Rosa Kai Ella Noah Ivy Omar Zoe Hugo Maya "
    "Paul Ada Felix Clara Dan Ruth Theo Jane Otto Kate Amir Bella Carl Dora Eli Faye Gus Hana Ian Jill Kim Lars Milo Nora",
    "where": "in_a_forest by_the_sea on_a_farm in_a_village on_a_hill in_a_big_city by_a_river in_the_snow on_an_island "
    "in_a_garden at_school in_a_castle in_the_desert on_a_boat in_a_cave at_the_market in_the_mountains under_a_bridge",
    "does": "finds loses wants shares breaks hides builds gives_away steals is_looking_for is_afraid_of trades paints buys "
    "forgets",
    "thing": "ball key hat boat apple book kite lamp bell cake box coin drum egg flower map mirror ring rope seed shoe "
    "star stone sword wheel bread bag clock bike blanket letter ladder bucket feather shell candle basket whistle",
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=320, help="the most that a story may have")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/stories"), help="a file per batch")
    parser.add_argument("--out", type=Path, default=HERE / "stories.jsonl.bz2")
    return parser.parse_args()


def orders(batch, size):
    """The orders of one batch, drawn by its number."""
    draw = random.Random(batch)
    words = {place: [word.replace("_", " ") for word in text.split()] for place, text in WORDS.items()}
    return [ORDER.format(**{place: draw.choice(choice) for place, choice in words.items()}) for _ in range(size)]


@torch.inference_mode()
def told(model, tokenizer, batch, size, tokens, temperature, top_k):
    """The stories of one batch: [{"order", "text", "ended"}]."""
    torch.manual_seed(batch)
    asked = orders(batch, size)
    chats = [[{"role": "user", "content": order}] for order in asked]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0, "max_new_tokens": tokens}
    answers = model.generate(**inputs, **sampling, pad_token_id=tokenizer.eos_token_id)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    ended = (answers == tokenizer.eos_token_id).any(1).tolist()
    return [{"order": o, "text": t.strip(), "ended": e} for o, t, e in zip(asked, texts, ended)]


def good(stories):
    """Their texts up to the last whole sentence: long enough, in plain letters, not going round in circles, none twice."""
    seen = set()
    for story in stories:
        text = story["text"][: max(story["text"].rfind(end) for end in (".", "!", "?", '."', '!"', '?"')) + 2].strip()
        varied = len(zlib.compress(text.encode())) > 0.4 * len(text)
        if len(text) > 300 and text.isascii() and varied and text[:100] not in seen:
            seen.add(text[:100])
            yield text


def main():
    arguments = parse_arguments()
    model, tokenizer = load_checkpoint("smollm2-135m")
    tokenizer.padding_side = "left"
    everything = HeadPlan.uniform(model.config, *[model.config.num_key_value_heads] * 2)
    model = fuse(model, everything, method="mean")  # the same model, but decoding copies no head
    settings = (arguments.batch_size, arguments.tokens, arguments.temperature, arguments.top_k)
    folder = arguments.work_dir / "-".join(map(str, settings))  # nothing else decides a batch, but its number
    files = [folder / f"{batch:05d}.jsonl" for batch in range(arguments.batches)]
    for batch, file in enumerate(tqdm(files, "batches of stories")):
        if not file.exists():
            write_whole(file, "".join(json.dumps(story) + "\n" for story in told(model, tokenizer, batch, *settings)))
    stories = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    packed = "".join(json.dumps({"text": text}) + "\n" for text in good(stories))
    partial = arguments.out.with_name(f".{arguments.out.name}.partial")
    partial.write_bytes(bz2.compress(packed.encode()))
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
