"""Writes the embedded model's tokenizer as files for transformers, which load testers count tokens with."""

import sys

from transformers import PreTrainedTokenizerFast

from engine.config import EngineConfig
from engine.weights.checkpoint import open_checkpoint

if __name__ == "__main__":
    ours = open_checkpoint(EngineConfig().model).tokenizer
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=ours.backend,
        bos_token=ours.bos_token,
        eos_token=ours.eos_token,
        chat_template=ours.chat_template,
    )
    theirs.save_pretrained(sys.argv[1])
