"""Draw the score matrices of finished runs side by side: python scripts/draw_matrices.py OUT.png RUN [RUN ...]"""

from __future__ import annotations

import sys
from pathlib import Path

from mllm_keeplora.eval.results import Results
from mllm_keeplora.report import save_png, score_matrix_figure


def main(out: str, *runs: str) -> None:
    results = [Results.load(Path(run) / "results.json").to_dict() for run in runs]
    titles = []
    for each in results:
        titles.append(f"{each['strategy']}: Last {each['metrics']['last']:.1f}, BWT {each['metrics']['bwt']:+.1f}")
    save_png(score_matrix_figure(results, titles), out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
