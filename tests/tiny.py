"""A tiny random llama with a real tokenizer and chat template, and rows to train it on."""

import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYMPTOMS = ["fever", "a dry cough", "back pain", "a rash", "nausea", "dizziness", "a sore throat", "fatigue"]
ADVICE = ["rest and drink water", "see a doctor soon", "measure it again tomorrow", "avoid heavy work"]


def chat_rows(n: int) -> list[dict]:
    """n single-turn conversations, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Patient {i} has {SYMPTOMS[i % 8]}. What now?"},
                {"role": "assistant", "content": f"With {SYMPTOMS[i % 8]}, {ADVICE[i % 4]}."},
            ]
        }
        for i in range(n)
    ]


def build_tokenizer(folder: Path, *, chat_template: str | None = CHATML) -> None:
    """A byte-level BPE trained on this file's sentences, saved as a fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([json.dumps(row) for row in chat_rows(64)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=512,
    )
    if chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def build_model(folder: Path) -> None:
    """A Hugging Face folder with a random llama: 2 layers, hidden size 64, about 150 k parameters."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    build_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
