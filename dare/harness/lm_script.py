"""`dare-lm-eval`: lm-eval's own command line, with the model `dare` registered.

lm-eval looks for no plug-ins by itself, so a script of ours has to import them first.
"""

from __future__ import annotations

import sys

from dare.core.errors import DareError


def main() -> None:
    """Run `lm_eval` with the words of this command line; a user's mistake is a message and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import dare.harness.lm_model  # noqa: F401  registers the model
    except ImportError as error:
        print(f"lm-eval is not installed here ({error}); pip install 'dare-dllm[lm-eval]'", file=sys.stderr)
        sys.exit(2)
    try:
        cli_evaluate()
    except DareError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
