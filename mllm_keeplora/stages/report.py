"""Stage `report`: collect what was measured into results.json and report.html."""

from __future__ import annotations

from mllm_keeplora.eval.results import Results, collect_results
from mllm_keeplora.report.page import write_report
from mllm_keeplora.stages.learner import Learner
from mllm_keeplora.system import distributed, watch


def report(learner: Learner) -> Results:
    """Collect what was measured, compute the metrics, write results.json and report.html."""
    watch.enter("report")
    run, benchmark = learner.run, learner.benchmark
    results = collect_results(run, benchmark, learner.config)
    if distributed.is_main():
        results.save()
        write_report(run, results, benchmark)
        run.save()
    distributed.barrier()
    return results
