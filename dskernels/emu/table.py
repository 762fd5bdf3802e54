"""The instruction table: what the emulator supports, straight from the decoder."""

from dskernels._C import emu as _emu


def instruction_table() -> list[dict]:
    """Rows of the decoder's table: pattern, full_pattern (classes expanded), summary, min_sm."""
    return _emu.table()


def instruction_table_markdown() -> str:
    """The table as Markdown, for docs/emulator_instructions.md (a test keeps it current)."""
    lines = [
        "# Supported PTX instructions",
        "",
        "Generated from the decoder's table by `python -m dskernels.emu table`. A token lists",
        "alternatives (`rn|rz`), may be optional (`ftz?`) or name a class (`{scope}`).",
        "",
        "| instruction | since | does |",
        "| --- | --- | --- |",
    ]
    for row in instruction_table():
        pattern = row["pattern"].replace("|", "\\|")
        lines.append(
            f"| `{pattern}` | sm_{row['min_sm']} | {row['summary']} |".replace("\\|\\|", "|")
        )
    return "\n".join(lines) + "\n"
