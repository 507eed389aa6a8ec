"""Run by another Python, with another transformers: ``python reader.py < request.json`` prints what it reads in folders.

The request lists ``[folder, text, literals]``. The answer has for each folder and each way to load a tokenizer the class, the
ids of the text, those of the literals, how often each is found in itself written twice; and what a configuration and a
processor give; or the error in words. Nothing of the project is imported.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import transformers

WAYS = {
    "auto": lambda folder: transformers.AutoTokenizer.from_pretrained(folder),
    "auto slow": lambda folder: transformers.AutoTokenizer.from_pretrained(folder, use_fast=False),
    "slow": lambda folder: transformers.LlamaTokenizer.from_pretrained(folder),
    "fast": lambda folder: transformers.LlamaTokenizerFast.from_pretrained(folder),
}


def attempt(read):
    try:
        return read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]


def tokens(load, folder, text, literals):
    tokenizer = load(folder)
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "ids": tokenizer(text)["input_ids"],
        "literals": tokenizer.convert_tokens_to_ids(literals),
        "twice": [
            tokenizer(2 * literal, add_special_tokens=False)["input_ids"].count(id)
            for literal, id in zip(literals, tokenizer.convert_tokens_to_ids(literals))
        ],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


def config(folder):
    found = transformers.AutoConfig.from_pretrained(folder)
    text = getattr(found, "text_config", found)
    theta = getattr(text, "rope_theta", None) or text.rope_parameters["rope_theta"]
    return {"class": type(found).__name__, "rows": text.vocab_size, "rope_theta": theta}


def processor(folder):
    from PIL import Image

    loaded = transformers.AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (40, 30), (200, 100, 50))
    found = loaded(text="USER: <image>\nHi ASSISTANT:", images=image, return_tensors="np")
    ids = found["input_ids"][0].tolist()
    shape = list(found["pixel_values"].shape)
    return {"class": type(loaded).__name__, "ids": ids, "pixels": shape}


answer = {
    folder: {
        **{
            way: attempt(lambda load=load, request=request: tokens(load, *request)) for way, load in WAYS.items()
        },
        "config": attempt(lambda folder=folder: config(folder)),
        "processor": attempt(lambda folder=folder: processor(folder)),
    }
    for request in json.load(sys.stdin)
    for folder in [request[0]]
}  # fmt: skip
print(json.dumps({"version": transformers.__version__, "folders": answer}))
