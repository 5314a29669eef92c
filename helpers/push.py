"""Push a trained adapter to the Hugging Face Hub with a model card; a dry run shows what would go and needs no token.

python3 -m helpers.push --adapter runs/train --repo_id me/my-adapter --dry-run
python3 -m helpers.push --adapter runs/train --repo_id me/my-adapter
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .results import read_rows

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PUSHED = ("adapter_config.json", "adapter_model.safetensors", "tokenizer*", "special_tokens_map.json", "vocab.json",
          "merges.txt", "chat_template.jinja", "train_log.csv")  # fmt: skip
CARD = """# {name}

A LoRA adapter for [{base}](https://huggingface.co/{base}), trained by QLoRA: the base in 4-bit NF4 with double
quantisation, rank {rank}, alpha {alpha}, on {targets}.{log}

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```
"""


@dataclass
class PushArguments:
    """What the command can be told."""

    adapter: str = field(metadata={"help": "folder that training saved the adapter in"})
    repo_id: str = field(metadata={"help": "OWNER/NAME on the Hub; made where it does not exist"})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of a base that was a folder here"})
    private: bool = field(default=False, metadata={"help": "make the repository private"})
    dry_run: bool = field(default=False, metadata={"help": "list files, sizes and the model card; upload nothing"})


def stage(adapter: str, repo_id: str, base_model: str | None, folder: Path) -> list[Path]:
    """Put into ``folder`` what the Hub is to get: the adapter naming its base by Hub id, tokenizer, log, model card.

    Raises:
        ValueError: no adapter there, an impossible ``repo_id``, or a base that others could not load.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.utils import validate_repo_id

    from .adapters import base_of

    base = base_of(adapter)
    validate_repo_id(repo_id)
    if not base_model and Path(base).is_dir():
        if not Path(base).name.startswith(EMBEDDED_ID.rpartition("/")[2]):
            raise ValueError(f"the base was the folder {base!r}, which is here alone: give its Hub id, --base_model")
        base_model = EMBEDDED_ID
    base = base_model or base
    validate_repo_id(base)
    files = sorted({path for pattern in PUSHED for path in Path(adapter).glob(pattern) if path.is_file()})
    if not any(path.name == "adapter_model.safetensors" for path in files):
        raise ValueError(f"{adapter!r} holds no adapter_model.safetensors: was its training ended?")
    for path in files:
        shutil.copy(path, folder / path.name)
    named = folder / "adapter_config.json"
    config = json.loads(named.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    named.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    data = ModelCardData(base_model=base, library_name="peft", pipeline_tag="text-generation", tags=["lora", "qlora"])
    text = CARD.format(
        name=repo_id.rpartition("/")[2], repo_id=repo_id, base=base, rank=config["r"], alpha=config["lora_alpha"],
        targets=", ".join(sorted(config["target_modules"])), log=_log_line(Path(adapter) / "train_log.csv"),
    )  # fmt: skip
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
    return sorted(folder.iterdir())


def push(
    adapter: str, repo_id: str, base_model: str | None = None, private: bool = False, dry_run: bool = False
) -> str:
    """Upload, or with ``dry_run`` only print what would be; returns the address.

    Raises:
        ValueError: as `stage`; or no token, before anything is sent.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not dry_run and not get_token():
        raise ValueError("no token for the Hub: `hf auth login`, or set HF_TOKEN; --dry_run needs none")
    with tempfile.TemporaryDirectory() as scratch:
        files = stage(adapter, repo_id, base_model, Path(scratch))
        for path in files:
            print(f"{path.name:32s} {path.stat().st_size / 1024**2:10.3f} MiB")
        if dry_run:
            print(f"\nREADME.md:\n{(Path(scratch) / 'README.md').read_text(encoding='utf-8')}\nnothing was uploaded")
            return f"{constants.ENDPOINT}/{repo_id}"
        api = HfApi()
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(folder_path=scratch, repo_id=made.repo_id, commit_message="LoRA adapter")
        return str(made)


def _log_line(log: Path) -> str:
    rows = read_rows(log)
    ends = [f"{float(row['loss']):.4f} at step {row['step']}" for row in (rows[:1] + rows[-1:])]
    return f" Loss {', '.join(ends)}." if ends else ""


def main(argv: list[str] | None = None) -> int:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from transformers import HfArgumentParser

    parser = HfArgumentParser(PushArguments, prog="python3 -m helpers.push", description=__doc__.split("\n")[0])
    args = PushArguments(**vars(parser.parse_args(argv)))
    try:
        address = push(args.adapter, args.repo_id, args.base_model, args.private, args.dry_run)
    except (ValueError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(address if not args.dry_run else f"would be: {address}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
