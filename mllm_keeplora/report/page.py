"""The report page of a run: results, pictures, and samples of what was answered wrongly."""

from __future__ import annotations

from mllm_keeplora.data import Benchmark, Media
from mllm_keeplora.data.media.frames import kept_frames
from mllm_keeplora.eval.grading import stored_rows
from mllm_keeplora.eval.results import Results, collect_results
from mllm_keeplora.eval.saved import SavedRun
from mllm_keeplora.report.published import published_table
from mllm_keeplora.report.render.diagnostics import Diagnostics, Gradient, UnitFacts, inspection_figures
from mllm_keeplora.report.render.html import WrongAnswer, render_html
from mllm_keeplora.runs import RunDir
from mllm_keeplora.system import distributed, files, given

STRIP, COLUMNS = 8, 4  # frames of a clip that are shown, and beside one another


def write_report(run: RunDir, results: Results, benchmark: Benchmark) -> None:
    """Write report.html, one self-contained file."""
    config = given.as_text(given.read_bytes(run.config_file, given.MOST_YAML))
    values = {**results.to_dict(), "config": config}
    diagnosed = inspection_figures(unit_facts(run))
    page = render_html(values, wrong_answers(run, benchmark), diagnosed, published_table(results))
    files.write_text(run.report_file, page)


def refresh_results(saved: SavedRun) -> Results:
    """Collect a run's results from its predictions again; rewrites results.json and report.html."""
    benchmark = saved.benchmark
    with saved.run.locked():
        saved.run.adopt()
        results = collect_results(saved.run, benchmark, saved.config)
        if distributed.is_main():
            results.save()
            write_report(saved.run, results, benchmark)
            saved.run.save()
    return results


def unit_facts(run: RunDir) -> list[UnitFacts]:
    """Read what each finished unit wrote about its gradient and its effect."""
    return [
        UnitFacts(
            unit.name,
            files.read_json(folder.gradient, Gradient) if files.is_there(folder.gradient) else {},
            files.read_json(folder.diagnostics, Diagnostics) if files.is_there(folder.diagnostics) else {},
        )
        for unit in run.finished_units
        for folder in (run.folder(unit),)
    ]


def wrong_answers(run: RunDir, benchmark: Benchmark, samples: int = 3) -> list[WrongAnswer]:
    """Find the first few questions of each domain that the last unit's model got wrong, with their pictures."""
    found: list[WrongAnswer] = []
    if not run.finished_units:
        return found
    folder = run.folder(run.finished_units[-1])
    for name in benchmark.domains:
        path = folder.predictions(name)
        if not files.is_there(path):
            continue
        wrong = [row for row in stored_rows(path) if row["score"] is not None and row["score"] < 1][:samples]
        shown = {row["id"] for row in wrong}
        pictures = {record.id: record.media for record in benchmark.test_records(name) if record.id in shown}
        for row in wrong:
            media = pictures.get(row["id"])
            picture = _png(media[0]) if media else None
            gold = row["answer"] if isinstance(row["answer"], str) else " | ".join(dict.fromkeys(row["answer"]))
            found.append(WrongAnswer(name, row["question"], row["prediction"], gold, picture))
    return found


def _png(media: Media) -> bytes:
    from io import BytesIO

    from mllm_keeplora.data.media.images import read_image

    buffer = BytesIO()
    if media.type == "video":
        picture = strip(media)
    else:
        picture = read_image(media)
        picture.thumbnail((256, 256))
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def strip(media: Media):
    """Put up to eight frames of a clip into rows of four, each with its second below."""
    from PIL import Image, ImageDraw

    clip = kept_frames().clip(media)
    count = len(clip.frames)
    shown = sorted({place * (count - 1) // max(min(count, STRIP) - 1, 1) for place in range(min(count, STRIP))})
    pictures = [Image.fromarray(clip.frames[place]) for place in shown]
    for picture in pictures:
        picture.thumbnail((128, 128))
    columns, rows = min(len(pictures), COLUMNS), -(-len(pictures) // COLUMNS)
    width, height = pictures[0].width + 2, pictures[0].height + 14
    strip = Image.new("RGB", (columns * width - 2, rows * height), (255, 255, 255))
    for number, (place, picture) in enumerate(zip(shown, pictures, strict=True)):
        corner = (number % COLUMNS * width, number // COLUMNS * height)
        strip.paste(picture, corner)
        below = (corner[0], corner[1] + picture.height + 2)
        ImageDraw.Draw(strip).text(below, f"{clip.times[place]:.1f} s", fill=(0, 0, 0))
    return strip
