"""Chat templates: those of the names that a recipe may say, written from the formats' public descriptions, and those
that model folders bring along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.read import MAX_CONFIG
from pymerge.errors import CorruptFile

# Each ends the text of a turn as the models of the format were trained: no white space beyond what the format has.
BUILT_IN = {
    # Stanford Alpaca: a preamble, then sections under headings, with a blank line between them.
    "alpaca": (
        "{%- set heading = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} -%}"
        "{%- set preambles = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | list -%}"
        "{{ (preambles[-1] | trim if preambles else '') ~ '\\n\\n' }}"
        "{%- for message in messages -%}{%- if message.role in heading -%}"
        "{{ '### ' ~ heading[message.role] ~ ':\\n' ~ (message.content | trim) }}"
        "{%- if not loop.last or (add_generation_prompt and message.role != 'assistant') -%}{{ '\\n\\n' }}{%- endif -%}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}{{ '### Response:\\n' }}{%- endif -%}"
    ),
    # OpenAI's ChatML: <|im_start|>ROLE, the text, <|im_end|>.
    "chatml": (
        "{%- for turn in messages -%}"
        "{{ '<|im_start|>%s\\n%s<|im_end|>\\n' | format(turn.role, turn.content) }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    # LG EXAONE 3: [|ROLE|]text; all turns but the user's end in [|endofturn|]; there is always a system turn.
    "exaone": (
        "{%- if messages[0].role != 'system' -%}{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}"
        "{%- for turn in messages -%}"
        "{{ '[|' ~ turn.role ~ '|]' ~ turn.content ~ ('' if turn.role == 'user' else '[|endofturn|]') ~ '\\n' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}"
    ),
    # Meta Llama 3: header of the role, blank line, text, <|eot_id|>.
    "llama3": (
        "{%- macro header(role) -%}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{%- endmacro -%}"
        "{{ bos_token }}{%- for turn in messages -%}"
        "{{ header(turn.role) ~ (turn.content | trim) ~ '<|eot_id|>' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ header('assistant') }}{%- endif -%}"
    ),
    # Mistral 7B Instruct: the system text opens the first instruction; user and assistant take turns.
    "mistral": (
        "{%- set first = 1 if messages[0].role == 'system' else 0 -%}{{ bos_token }}"
        "{%- for turn in messages[first:] -%}"
        "{%- if turn.role != ('user' if loop.index0 is even else 'assistant') -%}"
        "{{ raise_exception('roles must alternate: user, assistant, user, ..., after at most one system message') }}"
        "{%- endif -%}"
        "{%- if turn.role == 'user' -%}"
        "{%- set opening = messages[0].content ~ '\\n\\n' if first and loop.first else '' -%}"
        "{{ ' [INST] ' ~ opening ~ turn.content ~ ' [/INST]' }}"
        "{%- else -%}{{ ' ' ~ turn.content ~ eos_token }}{%- endif -%}{%- endfor -%}"
    ),
}


def chosen(asked: str, folders: Iterable[Path]) -> tuple[str | None, str]:
    """The template that a recipe asks for, and how it was found, for the summary. `auto`: the one that most of the
    models have, of equally many the first; None where none has one."""
    if asked in BUILT_IN:
        return BUILT_IN[asked], asked
    if asked != "auto":
        return asked, "the recipe's"
    found = [template.strip() for folder in folders if (template := template_of(folder))]
    if not found:
        return None, "auto: no model has one"
    template, times = Counter(found).most_common(1)[0]
    return template, f"auto: that of {times} of {len(found)} models that have one"


def template_of(folder: Path) -> str | None:
    """The default chat template in a model's folder."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_CONFIG:
            raise CorruptFile(f"{path}: longer than {MAX_CONFIG} bytes")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CorruptFile(f"{path}: not UTF-8 text") from None
    config = folder / "tokenizer_config.json"
    found: Any = read_json_object(config, MAX_CONFIG).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
