"""Metrics that `evaluate.load(metric_path(name), configuration)` loads from disk, without the Hub."""

from pathlib import Path


def metric_path(name: str) -> str:
    """
    Args:
        name (`str`): a metric of this folder, such as `"glue"`.

    Returns:
        `str`: the folder that `evaluate.load` takes.

    Raises:
        ValueError: if there is no such metric; the message names those there are.
    """
    folder = Path(__file__).parent
    known = sorted(path.stem for path in folder.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"There is no metric {name!r}. Known are {', '.join(known)}.")
    return str(folder / name)


__all__ = ["metric_path"]
