"""A folder as a reward model stage leaves it: a DeepSeek-V3 with a random head."""

from __future__ import annotations

import json
from pathlib import Path

SCALE = {"part": "answer", "template": "plain", "value_mean": 0.5, "value_std": 2.0}


def save_reward_model(source: Path, folder: Path) -> Path:
    """Of `source`'s weights and tokenizer, in `folder`, which is returned."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_labels": 1, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "megatron_r1.json").write_text(json.dumps(SCALE))
    return folder
