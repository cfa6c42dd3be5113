"""A mirror, not a gate: lines per folder, long files, long functions, packages depended on. `make size`."""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONG_FILE, LONG_FUNCTION = 500, 60
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def main() -> int:
    """Print the mirror."""
    write = sys.stdout.write
    per_folder: Counter[str] = Counter()
    long_files, long_functions = [], []
    for path in sorted((ROOT / "src/weft").rglob("*.py")):
        if "_pb2" in path.name:
            continue
        name = str(path.relative_to(ROOT / "src/weft"))
        text = path.read_text(encoding="utf-8")
        lines = code_lines(text)
        per_folder[name.split("/", maxsplit=1)[0]] += lines
        if lines > LONG_FILE:
            long_files.append((lines, name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > LONG_FUNCTION:
                    long_functions.append((length, f"{name}:{node.lineno} {node.name}"))
    write("Python lines with code\n")
    for folder, lines in per_folder.most_common():
        write(f"  {lines:6}  {folder}\n")
    write(f"  {sum(per_folder.values()):6}  in all\n")
    native = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for pattern in ("*.cpp", "*.h", "*.inl")
        for path in (ROOT / "src/weft").rglob(pattern)
    )
    write(f"  {native:6}  C++ (all lines)\n")
    write(f"  {sum(code_lines(p.read_text(encoding='utf-8')) for p in (ROOT / 'tests').rglob('*.py')):6}  tests\n")
    for title, rows in (
        (f"Files over {LONG_FILE} lines", long_files),
        (f"Functions over {LONG_FUNCTION} lines", long_functions),
    ):
        write(f"{title}: {len(rows)}\n")
        for length, name in sorted(rows, reverse=True):
            write(f"  {length:6}  {name}\n")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.search(r"\ndependencies = \[\n(.*?)\n\]", project, re.DOTALL)
    write(f"Packages needed to serve: {len(required[1].splitlines()) if required else 0}\n")
    return 0


def code_lines(text: str) -> int:
    """Lines that hold a token which is no comment and no docstring."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


if __name__ == "__main__":
    sys.exit(main())
