"""Names of a model's files, as transformers and peft save them, and of its settings."""

ADAPTER_FILE = "adapter_config.json"
SETTINGS_FILE = "sgpo.json"
WHOLE_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = (*WHOLE_WEIGHTS, ADAPTER_WEIGHTS)
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CONFIGS = (CONFIG, GENERATION_CONFIG, ADAPTER_FILE)
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    CHAT_TEMPLATE,
)
MODEL_FILES = (*WEIGHTS, *CONFIGS, *TOKENIZER, SETTINGS_FILE)
WARMSTART_DIRECTORY = "warmstart"
"""Folder of a run with the model that its warm start made."""
