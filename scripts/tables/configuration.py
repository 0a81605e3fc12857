"""The keys of a configuration, from the models themselves."""

from typing import Any

from pydantic import BaseModel

from fedex_lora.config import Config


def rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            lines += rows(annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{field.default!r}`"
        lines.append(f"| `{prefix}{name}` | {default} | {(field.description or '').replace('|', chr(92) + '|')} |")
    return lines


def tables() -> dict[str, list[str]]:
    return {"keys": ["| key | default | meaning |", "|---|---|---|", *rows(Config)]}
