import json
import sys
from pathlib import Path

import ablation
import ablation_table
import kept_runs
import pytest
from ablation_grid import BASELINE, FLOAT, LENGTHS, START, Cell, chosen, part_name, part_of_grid, planned
from ablation_jobs import estimate, evaluations, make_jobs, prune
from ablation_table import command_line, write_results
from detectron2.modeling import META_ARCH_REGISTRY
from kept_runs import recall_runs

from aqdet.config import load_config
from aqdet.engine import check_config


@pytest.fixture
def parse(monkeypatch, tmp_path):
    def parsed(*argv):
        monkeypatch.setattr(sys, "argv", ["ablation", "--output", str(tmp_path), *argv])
        return ablation.parse_args()

    return parsed


def set_root(patched, root):
    """Where RESULTS.md, plots and kept runs are written."""
    for module in (ablation_table, kept_runs):
        patched.setattr(module, "ROOT", root)


def finish(job, ap):
    folder = Path(job.output_dir)
    (folder / "inference").mkdir(parents=True, exist_ok=True)
    (folder / "inference" / "metrics.json").write_text(json.dumps({"AP": ap, "AP50": 2 * ap}))
    noted = {"fingerprint": job.fingerprint(), "seconds": 120.0, "date": "2026-01-02"}
    noted |= {"machine": "a machine", "command": "python tools/train_net.py"}
    (folder / "done.json").write_text(json.dumps(noted))


def test_every_run_of_the_grid_is_a_valid_config_of_its_own_from_its_seeds_start(parse):
    seen = set()
    for dataset, count in (("shapes", 37), ("bccd", 17), ("cards", 15)):
        args = parse("--dataset", dataset, "--seeds", "3", "--taps", "fpn")
        cells = planned(dataset, "fpn", ())
        jobs = make_jobs(args, cells)
        detectors = {cell.detector for cell in cells}
        assert len(set(cells)) == len(cells) == count
        assert len(jobs) == count + len(detectors) + any("two_stage" in cell.parts for cell in cells)
        for (seed, cell), job in jobs.items():
            cfg = load_config(job.config, job.overrides)
            check_config(cfg)
            assert cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY and cfg.SEED == seed == 3
            start, parts = cell.quantizer == START, cell.method.split("+")
            assert cfg.SOLVER.MAX_ITER == job.iterations == LENGTHS[dataset][not start]
            method = "aux_fpn" if "two_stage" in parts else BASELINE
            source = jobs[3, Cell(cell.detector, START, 32, method)]
            assert cfg.MODEL.WEIGHTS == ("" if start else source.output_dir + "/model_final.pth")
            assert (source in job.sources) != start
            assert cfg.MODEL.QUANT.ENABLED == (cell.quantizer not in (START, FLOAT))
            assert cfg.MODEL.EXTRA_LOSS.ENABLED == ("extra" in parts)
            assert bool(cfg.MODEL.DISTILL.WEIGHTS) == ("distill" in parts)
            if "distill" in parts:  # the teacher has the same start
                recipe = "two_stage" if "two_stage" in parts else BASELINE
                teacher = jobs[3, Cell(cell.detector, FLOAT, 32, recipe)]
                assert cfg.MODEL.DISTILL.WEIGHTS == f"{teacher.output_dir}/model_final_stripped.pth"
                assert teacher.sources == (source,)
            taps = [part.removeprefix("aux_") for part in parts if part.startswith("aux_")]
            assert [cfg.MODEL.AUX.TAPS] * cfg.MODEL.AUX.ENABLED == taps
            if cfg.MODEL.QUANT.ENABLED:
                of_inputs = "lsq" if cell.quantizer == "lsqodd" else cell.quantizer
                for node, name in ((cfg.MODEL.QUANT.WEIGHT, cell.quantizer), (cfg.MODEL.QUANT.INPUT, of_inputs)):
                    assert (node.QUANTIZER, node.NUM_BITS) == (name, cell.bits)
            seen.add(job.output_dir)
        order = [cell for _, cell in jobs]
        assert all(order.index(Cell(d, START, 32, BASELINE)) == 0 or d == "fcos" for d in detectors)
    assert len(seen) == 37 + 3 + 17 + 2 + 15 + 2


def test_a_narrower_network_has_runs_and_a_table_of_its_own(parse):
    usual, narrow = (parse("--dataset", "cards", *more) for more in ((), ("--width", "16")))
    cells = planned("cards", "backbone")
    job, other = (make_jobs(args, cells)[0, cells[0]] for args in (usual, narrow))
    assert other.name == f"{job.name}_width16" and other.output_dir == f"{job.output_dir}_width16"
    models = [load_config(j.config, j.overrides).MODEL for j in (job, other)]
    widths = [(m.RESNETS.STEM_OUT_CHANNELS, m.RESNETS.RES2_OUT_CHANNELS, m.FPN.OUT_CHANNELS) for m in models]
    assert widths == [(64, 64, 64), (16, 16, 32)] and {m.RETINANET.NUM_CLASSES for m in models} == {6}
    assert part_name(usual) == "cards" and part_name(narrow) == "cards width16"
    assert command_line(narrow).endswith("--cards-root cards --width 16 --taps backbone")


def test_options_leave_out_but_never_full_precision(parse):
    args = parse("--bits", "2", "--methods", "baseline", "aux_fpn+extra", "--detectors", "retinanet")
    cells = part_of_grid(args, planned("shapes", "both", args.methods))
    run = [str(cell) for cell in cells if chosen(args, cell)]
    assert run == [
        "retinanet_float",
        "retinanet_lsq_w2a2_baseline",
        "retinanet_lsq_w2a2_aux_fpn+extra",
        "retinanet_dorefa_w2a2_baseline",
        "retinanet_pact_w2a2_baseline",
        "retinanet_lqnet_w2a2_baseline",
        "retinanet_lsqodd_w2a2_baseline",
    ]
    args = parse("--quantizers", "lsq", "--", "MODEL.DEVICE", "cpu")
    jobs = make_jobs(args, part_of_grid(args, planned("shapes", "both")))
    assert not any("dorefa" in job.name for job in jobs.values()) and any("fcos" in job.name for job in jobs.values())
    assert all(job.overrides[-2:] == ("MODEL.DEVICE", "cpu") for job in jobs.values())
    with pytest.raises(SystemExit):
        parse("--methods", "baseline", "auxiliary")


def test_a_two_stage_run_starts_from_one_with_its_own_auxiliary_path(parse):
    args = parse("--bits", "4", "--methods", "two_stage", "aux_fpn+two_stage", "--detectors", "retinanet")
    cells = part_of_grid(args, planned("shapes", "backbone", args.methods))
    jobs = make_jobs(args, [cell for cell in cells if chosen(args, cell)])
    taps = {
        str(cell): load_config(job.sources[0].config, job.sources[0].overrides).MODEL.AUX
        for (seed, cell), job in jobs.items()
        if job.sources and seed == 0
    }
    # Full precision from the usual start is no row's: neither is trained.
    assert {name: aux.ENABLED and aux.TAPS for name, aux in taps.items()} == {
        "retinanet_float_two_stage": "backbone",
        "retinanet_lsq_w4a4_two_stage": "backbone",
        "retinanet_lsq_w4a4_aux_fpn+two_stage": "fpn",
    }


def test_estimate_by_the_pace_of_finished_runs(parse):
    args = parse("--seeds", "0", "--bits", "2", "--quantizers", "lsq", "--methods", "baseline")
    cells = [c for c in planned("shapes", "fpn") if chosen(args, c) and str(c).count("retinanet_lsq_")]
    cells.insert(0, Cell("retinanet", FLOAT, 32, BASELINE))
    jobs = list(make_jobs(args, cells).values())
    assert "3 runs, 0 of them finished: 1400 iterations left, about 0.2 hours at 0.60 s" in estimate(args, jobs)
    finish(jobs[0], 50)
    assert "1 of them finished: 800 iterations left, about 0.0 hours at 0.20 s" in estimate(args, jobs)


def test_a_finished_run_keeps_what_is_read_later(parse):
    args = parse("--seeds", "5", "6")
    cell = Cell("retinanet", "lsq", 2, "aux_fpn")
    jobs = make_jobs(args, [cell])
    files = {"model_final.pth", "model_final_stripped.pth", "model_0000099.pth", "model_0000199.pth", "log.txt"}
    kept = {}
    for (seed, each), job in jobs.items():
        folder = Path(job.output_dir)
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).touch()
        prune(job, 5)
        kept[seed, each.quantizer] = {path.name for path in folder.iterdir()}
    always = {"model_final_stripped.pth", "log.txt"}
    assert kept[5, "start"] == kept[6, "start"] == always | {"model_final.pth"}
    assert kept[5, "lsq"] == always | {"model_0000099.pth"} and kept[6, "lsq"] == always


def test_table_by_hand_and_plot(parse, tmp_path, monkeypatch, capsys):
    args = parse("--seeds", "0", "1", "2", "--bits", "2", "--methods", "baseline", "distill")
    cells = planned("shapes", "fpn", ())
    jobs = make_jobs(args, cells)
    base, other = (Cell("retinanet", "lsq", 2, method) for method in ("baseline", "distill"))
    reference = Cell("retinanet", "float", 32, "baseline")
    aps = {reference: (52, 50, 51), base: (40, 44, 42), other: (43, 45)}
    for cell, values in aps.items():
        for seed, ap in enumerate(values):
            finish(jobs[seed, cell], ap)
    finish(jobs[0, Cell("retinanet", "start", 32, "baseline")], 30)
    set_root(monkeypatch, tmp_path)
    write_results(args, cells, jobs)
    text = (tmp_path / "RESULTS.md").read_text()
    rows = {tuple(line.split(" | ")[1:3]): line for line in text.splitlines() if line.startswith("| retinanet")}
    assert rows["float", "-"].endswith("| 51.0 ± 1.0 | 102.0 ± 2.0 | - | - | - | 52.0, 50.0, 51.0 |")
    ending = "| 42.0 ± 2.0 | 84.0 ± 4.0 | - | -9.0 ± 3.0 | -9.0 ± 3.0 | 40.0, 44.0, 42.0 |"
    assert rows["lsq w2a2", "baseline"].endswith(ending)
    # From seeds 0 and 1 alone: +3 and +1 over the baseline, -9 and -5 to full precision.
    ending = "| 44.0 ± 1.4 | 88.0 ± 2.8 | 2.0 ± 1.4 | -7.0 ± 2.8 | -7.0 ± 2.8 | 43.0, 45.0 |"
    assert rows["lsq w2a2", "distill"].endswith(ending)
    assert len(rows) == 3
    assert "\nLeft out (seeds): retinanet_lsq_w2a2_distill (2); retinanet_dorefa_w2a2_baseline (0, 1, 2); " in text
    assert "aux_fpn" not in text  # not asked for
    assert "AP of the starts: retinanet 30.0" in text and "2026-01-02" in text
    assert (tmp_path / "tools" / "experiments" / "plots" / "ablation_shapes.png").stat().st_size > 5000
    assert "Left out" in capsys.readouterr().out
    assert "--seeds 0 1 2 --methods baseline distill --bits 2 --taps backbone`" in text
    assert "AdamW, learning rate 0.002: retinanet starts, retinanet 2 bits, " in text
    # What was written below a table stays until there is something else to say.
    said = ""
    for remark in ("Reading: two.\n\nThe second paragraph.", "", "Reading: three.", ""):
        args.remark = remark
        write_results(args, cells, jobs)
        kept = (tmp_path / "RESULTS.md").read_text()
        said = remark or said
        assert kept == text.replace("\nLeft out (seeds)", f"\n{said}\n\nLeft out (seeds)")


def test_runs_are_kept_for_another_checkout(parse, tmp_path, monkeypatch):
    (tmp_path / "tools" / "experiments").mkdir(parents=True)
    options = ("--seeds", "0", "1", "--bits", "2", "--detectors", "retinanet", "--quantizers", "lsq")
    options += ("--methods", "baseline")
    start, baseline = (Cell("retinanet", *rest, BASELINE) for rest in ((START, 32), ("lsq", 2)))

    def grid(output):
        args = parse(*options, "--output", str(output))
        cells = part_of_grid(args, planned("shapes", "fpn"))
        return args, cells, make_jobs(args, [cell for cell in cells if chosen(args, cell)])

    monkeypatch.chdir(tmp_path)
    args, cells, jobs = grid("output")
    for (seed, cell), job in jobs.items():
        if seed == 0 or cell == start:
            finish(job, 40 + seed)
    with monkeypatch.context() as patched:
        set_root(patched, tmp_path)
        write_results(args, cells, jobs)
        first = (tmp_path / "RESULTS.md").read_text()
        (tmp_path / "output").rename(tmp_path / "gone")
        recall_runs("shapes", list(jobs.values()))
        # All of seed 0; of seed 1 nothing, whose start's weights are gone and needed.
        assert {key for key, job in jobs.items() if job.finished()} == {key for key in jobs if key[0] == 0}
        write_results(args, cells, jobs)
        assert (tmp_path / "RESULTS.md").read_text() == first and "a machine" in first
        finish(jobs[1, start], 41)
        Path(jobs[1, start].output_dir, "model_final.pth").touch()
        recall_runs("shapes", list(jobs.values()))
        assert jobs[1, start].finished()
        kept = json.loads((tmp_path / "tools" / "experiments" / kept_runs.RUNS).read_text())
        kept["shapes seed 0 retinanet_lsq_w2a2_baseline"]["fingerprint"] = "of another config"
        (tmp_path / "tools" / "experiments" / kept_runs.RUNS).write_text(json.dumps(kept))
        (tmp_path / "output").rename(tmp_path / "gone too")
        recall_runs("shapes", list(jobs.values()))
        assert not jobs[0, baseline].finished() and not jobs[0, start].finished()


def test_full_precision_of_the_rows_own_start_has_a_column(parse, tmp_path, monkeypatch):
    args = parse("--seeds", "0", "--bits", "2", "--quantizers", "lsqodd", "--methods", "two_stage")
    cells = part_of_grid(args, planned("shapes", "backbone", args.methods))
    assert [str(c) for c in cells if chosen(args, c)] == ["retinanet_lsqodd_w2a2_two_stage"]
    cells = planned("shapes", "backbone", args.methods)
    jobs = make_jobs(args, cells)
    odd = Cell("retinanet", "lsqodd", 2, "two_stage")
    for cell, ap in ((Cell("retinanet", FLOAT, 32, BASELINE), 50), (odd.same_start, 53), (odd, 48)):
        finish(jobs[0, cell], ap)
    set_root(monkeypatch, tmp_path)
    (tmp_path / "tools" / "experiments").mkdir(parents=True)
    write_results(args, cells, jobs)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| lsqodd w2a2 | two_stage | 48.0 | 96.0 | - | -2.0 | -5.0 | 48.0 |" in text
    assert "| float | two_stage | 53.0 | 106.0 | 3.0 | 3.0 | - | 53.0 |" in text


def test_a_part_of_the_grid_has_a_table_of_its_own(parse, tmp_path, monkeypatch):
    for quantizer in ("lsq", "pact"):
        args = parse("--seeds", "0", "--detectors", "retinanet", "--quantizers", quantizer)
        cells = part_of_grid(args, planned("shapes", "fpn"))
        assert {cell.quantizer for cell in cells} == {"float", quantizer}
        jobs = make_jobs(args, cells)
        finish(jobs[0, Cell("retinanet", quantizer, 2, "baseline")], 40)
        with monkeypatch.context() as patched:
            set_root(patched, tmp_path)
            write_results(args, cells, jobs)
    text = (tmp_path / "RESULTS.md").read_text()
    for quantizer in ("lsq", "pact"):
        assert f"192x192 (retinanet {quantizer})\n" in text
        assert f"--detectors retinanet --quantizers {quantizer} --taps backbone" in text
        assert (tmp_path / "tools" / "experiments" / "plots" / f"ablation_shapes_retinanet_{quantizer}.png").is_file()


def test_runs_of_another_length_stand_beside_the_others(parse, tmp_path, monkeypatch):
    options = ("--seeds", "0", "--detectors", "retinanet", "--quantizers", "lsq")
    grids = [parse(*options, *more) for more in ((), ("--iterations", "800"), ("--start-iterations", "60"))]
    names = []
    for args in grids:
        cells = part_of_grid(args, planned("shapes", "fpn"))
        jobs = make_jobs(args, cells)
        by_name = {str(cell).removeprefix("retinanet_"): job for (_, cell), job in jobs.items()}
        start, reference = by_name["start"], by_name["float"]
        baseline, distill = by_name["lsq_w2a2_baseline"], by_name["lsq_w2a2_distill"]
        values = [dict(zip(job.overrides[::2], job.overrides[1::2], strict=True)) for job in (baseline, distill)]
        assert values[0]["MODEL.WEIGHTS"] == f"{start.output_dir}/model_final.pth"
        assert values[1]["MODEL.DISTILL.WEIGHTS"] == f"{reference.output_dir}/model_final_stripped.pth"
        finish(baseline, 40)
        with monkeypatch.context() as patched:
            set_root(patched, tmp_path)
            (tmp_path / "tools" / "experiments").mkdir(parents=True, exist_ok=True)
            write_results(args, cells, jobs)
        names.append((start.name, baseline.name, baseline.iterations))
    start, run = "seed 0 retinanet_start", "seed 0 retinanet_lsq_w2a2_baseline"
    assert names == [(start, run, 400), (start, f"{run}_800", 800), (f"{start}_from60", f"{run}_from60", 400)]
    text = (tmp_path / "RESULTS.md").read_text()
    assert [text.count(f"<!-- begin ablation shapes retinanet lsq{more} -->") for more in ("", " 600+800")] == [1, 1]
    assert "--taps backbone --start-iterations 600 --iterations 800`" in text and "--taps backbone`" in text
    with pytest.raises(SystemExit):
        parse("--iterations", "1")


def test_a_teacher_from_another_start_is_refused_with_the_way_out(parse, capsys):
    method = "aux_fpn+distill+two_stage"
    with pytest.raises(SystemExit):
        parse("--methods", method)
    assert f"the teacher of '{method}' has the start of --taps: add --taps fpn" in capsys.readouterr().err
    parse("--methods", method, "--taps", "fpn")
    parse("--methods", "aux_fpn+distill", "distill+two_stage")


def test_detectors_are_evaluated_on_another_split_without_training_again(parse, tmp_path, monkeypatch):
    options = ("--seeds", "0", "1", "--detectors", "retinanet", "--quantizers", "lsq", "--split", "test")
    args = parse(*options)
    cells = part_of_grid(args, planned("shapes", "fpn"))
    jobs = make_jobs(args, cells)
    assert evaluations(parse(*options[:-2]), jobs) == {}
    tests = evaluations(args, jobs)
    distill, reference = Cell("retinanet", "lsq", 2, "distill"), Cell("retinanet", "float", 32, "baseline")
    job = tests[0, distill]
    cfg = load_config(job.config, job.overrides)
    assert cfg.DATASETS.TEST == ("aqdet_shapes_test",) and cfg.MODEL.QUANT.WEIGHT.NUM_BITS == 2
    assert cfg.MODEL.WEIGHTS == f"{jobs[0, distill].output_dir}/model_final_stripped.pth"
    assert job.command("train_net.py")[1:3] == ["train_net.py", "--eval-only"]
    assert job.output_dir != jobs[0, distill].output_dir and job.sources == (jobs[0, distill],)
    with monkeypatch.context() as patched:
        set_root(patched, tmp_path)
        (tmp_path / "tools" / "experiments").mkdir(parents=True)
        for seed, cell in ((0, reference), (0, distill), (1, distill)):
            finish(jobs[seed, cell], 40)
        finish(tests[0, distill], 30)
        finish(tests[0, reference], 35)
        write_results(args, cells, jobs)
        # A detector that is still to be evaluated is trained again if its weights are gone.
        assert jobs[1, distill].finished()
        recall_runs("shapes", [*jobs.values(), *tests.values()])
        assert jobs[0, distill].finished() and not jobs[1, distill].finished()
    text = (tmp_path / "RESULTS.md").read_text()
    assert "192x192 (retinanet lsq test)" in text and "on\n2000 images (test)" in text
    assert "| lsq w2a2 | distill | 30.0 | 60.0 | - | -5.0 | -5.0 | 30.0 |" in text and "--split test`" in text
    assert "Left out (seeds): retinanet_lsq_w2a2_distill (1).\n" in text
    job = evaluations(parse("--dataset", "bccd", "--split", "test"), make_jobs(args, cells))[0, reference]
    assert "bccd_test" in load_config(job.config, job.overrides).DATASETS.TEST
