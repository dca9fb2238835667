import io
import re

import pytest
from rich.console import Console

from mllm_keeplora.report.render.tables import compare_table, results_table


def printed(renderable, width=80, color=False):
    console = Console(width=width, file=io.StringIO(), force_terminal=color, color_system="standard" if color else None)
    console.print(renderable)
    return console.file.getvalue()


def cells(text, label):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.replace(label, "", 1).split()


def test_the_results_table_shows_every_score_under_its_domain(results):
    text = printed(results_table(results))
    header = next(line for line in text.splitlines() if "general" in line)
    assert header.split() == ["RS", "Med", "AD", "Sci", "Fin", "general"]
    assert cells(text, "zero-shot") == ["39.1", "40.2", "39.7", "15.4", "30.3", "82.4"]
    assert cells(text, "blind") == ["35.3", "44.7", "45.3", "30.0", "22.0", "–"]
    assert cells(text, "questions") == ["400", "400", "400", "400", "400", "500"]
    for row, domain in zip(results["score_matrix"], results["domains"], strict=True):
        assert cells(text, f"after {domain}")[:5] == [f"{score:.1f}" for score in row]


def test_the_results_table_shows_metrics_times_and_what_was_run(results):
    text = printed(results_table(results))
    assert cells(text, "60.9") == ["48.6", "25.0", "63.0", "-2.7", "2.7", "95.4", "%"]
    assert "keeplora" in text and "tiny-llava" in text and "mini_dcl" in text and "seed 0" in text
    assert "train 3 min 12 s" in text and "total 4 min 23 s" in text and "peak memory 1.3 GiB" in text


def test_a_cell_that_was_not_measured_is_a_dash_not_a_zero(finetune_results):
    text = printed(results_table(finetune_results))
    assert cells(text, "after RS") == ["64.1", "–", "–", "–", "–", "71.0"]
    assert cells(text, "44.3")[:2] == ["–", "–"]


def test_rows_without_any_score_are_left_out(results):
    results["score_matrix"][:4] = [[None] * 5] * 4
    results["general"] = {}
    text = printed(results_table(results))
    assert "after RS" not in text and cells(text, "after all")[0] == "59.7"


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(results, finetune_results, width):
    for renderable in (results_table(results), compare_table([results, finetune_results])):
        lines = printed(renderable, width).splitlines()
        assert len(lines) > 5
        assert all(len(line) <= width for line in lines)
        for whole in ("Plasticity", "Forgetting", "95.4 %", "59.7", "-2.7"):
            assert whole in "\n".join(lines)


def test_long_domain_names_stay_on_one_line(results):
    names = ["ImageNet-R", "ArxivQA", "VizWiz", "CLEVR-Math", "Flickr30k"]
    lines = printed(results_table(results | {"domains": names})).splitlines()
    assert any(all(name in line for name in names) for line in lines)
    assert any("after CLEVR-Math" in line and "55.3" in line for line in lines)


def test_names_are_printed_as_they_are_not_as_markup(results):
    results["domains"][0] = "[red]RS"
    text = printed(results_table(results))
    assert text.split().count("[red]RS") == 2  # the head of its column and the label of its row


def test_compare_marks_the_best_of_each_column(results, finetune_results):
    text = printed(compare_table([results, finetune_results]), width=100, color=True)
    best = re.findall(r"\x1b\[1;32m\s*([^\x1b]+?)\s*\x1b", text)
    assert best == ["60.9", "-2.7", "2.7", "95.4 %", "63.7", "59.7", "63.1", "56.2", "53.9", "72.2"]


def test_compare_puts_seeds_of_one_setting_in_one_row(results, finetune_results):
    other_seed = results | {"seed": 1, "metrics": results["metrics"] | {"last": 62.9}}
    text = printed(compare_table([results, other_seed, finetune_results]), width=100)
    assert cells(text[: text.index("Final score")], "mini-keeplora")[0] == "61.9"  # the mean of 60.9 and 62.9
    assert "±1.4" in text and "mini-finetune" in text


def test_compare_shows_what_the_base_and_a_blind_answer_are_worth(results, finetune_results):
    text = printed(compare_table([results, finetune_results]), width=100)
    final = text[text.index("Final score") :]
    assert cells(final, "zero-shot") == ["39.1", "40.2", "39.7", "15.4", "30.3"]
    assert cells(final, "blind") == ["35.3", "44.7", "45.3", "30.0", "22.0"]


def test_references_stand_under_their_own_domains_when_the_order_differs(results, finetune_results):
    results |= {"zero_shot": [], "blind": []}
    finetune_results |= {"domains": finetune_results["domains"][::-1], "blind": []}  # so RS has the last, 30.3
    text = printed(compare_table([results, finetune_results]), width=100)
    assert cells(text[text.index("Final score") :], "zero-shot") == ["30.3", "15.4", "39.7", "40.2", "39.1"]


def test_compare_finds_domains_by_name_when_the_order_differs(results, finetune_results):
    order = [4, 0, 1, 2, 3]
    finetune_results["domains"] = [results["domains"][k] for k in order]
    finetune_results["score_matrix"][-1] = [72.2, 29.7, 42.5, 40.8, 36.1]
    text = printed(compare_table([results, finetune_results]), width=100)
    final = text[text.index("Final score") :]
    assert cells(final, "mini-finetune") == ["29.7", "42.5", "40.8", "36.1", "72.2"]


def test_compare_refuses_runs_on_other_domains_and_an_empty_list(results, finetune_results):
    with pytest.raises(ValueError, match=r"mini-finetune \(number 2: finetune, seed 0\) learned"):
        compare_table([results, finetune_results | {"domains": ["A", "B", "C", "D", "E"]}])
    with pytest.raises(ValueError, match="no results"):
        compare_table([])
