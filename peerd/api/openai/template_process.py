"""The process that renders chat templates: reads one JSON line, writes one, until standard input ends.

It has Transformers' own template environment and a memory limit, and nothing else: no model, no torch, no keys.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

# Python and Transformers take a small part of it; a template that needs more is broken or hostile.
_MEMORY_BYTES = 2 * 1024**3


def main() -> None:
    """Answer requests until standard input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    render: Any = render_jinja_template
    _write({"ready": True})
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            rendered, _ = render(
                conversations=[asked["messages"]],
                chat_template=asked["template"],
                add_generation_prompt=asked["opens_answer"],
                continue_final_message=asked["continues_last"],
                **asked["variables"],
            )
            _write({"text": rendered[0]})
        except MemoryError:
            sys.exit(1)
        except Exception as error:
            # An exception of a stranger's template is the template's error, not ours.
            _write({"error": f"{type(error).__name__}: {error}"[:500]})


def _write(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
