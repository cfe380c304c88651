"""The results file: what is finished, what is torn, what is best, and what to quote."""

import json
import re

import pytest

from metrics import results as results_module
from metrics.results import append_result, draw_figure, key_of, newest_of_each, protocol_line, read_results, table


def result(**changes):
    return {
        "checkpoint": "checkpoint_1.pth", "digest": "ab", "weights": "EMA", "sampler": "euler", "sample_N": 2,
        "ode_tol": None, "step_control": None, "rho": None, "arithmetic": "fp32", "init_noise_scale": 1.0,
        "class_label": -1, "seeds": {"samples": 42, "subsets": 42}, "num_samples": 100, "features": "inception",
        "target": "CIFAR10", "step": 500, "nfe": 2.0, "fid": 4.5321, "kid": None, "precision": None, "recall": None,
        "inception_score": 9.1, "nn_distance": 1.5, "nn_distance_real": 2.0, "seconds": 3.0, "reference": "CIFAR-10",
        "protocol": "uint8 by truncation", "versions": {"torch": "2"},
    } | changes


def test_results_are_read_back_without_a_line_torn_by_a_crash_which_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "eval" / "results.jsonl"
    assert read_results(path) == []
    append_result(path, result())
    with open(path, "a") as opened:
        opened.write(json.dumps(result(fid=1.0))[:40])
    append_result(path, result(fid=3.0, reference="naïve"))
    assert read_results(path) == [result(), result(fid=3.0, reference="naïve")]


@pytest.mark.parametrize("change", [
    {"digest": "cd"}, {"weights": "raw"}, {"sampler": "heun"}, {"sample_N": 3}, {"num_samples": 50},
    {"seeds": {"samples": 1, "subsets": 1}}, {"features": "pixels"}, {"target": "x.npz"}, {"class_label": 3},
    {"target_state": "12"}, {"extractor_digest": "12"}, {"eps": 1e-2}, {"image_shape": [3, 8, 8]}, {"batch_size": 7},
    {"training_images": ["CIFAR-10", [50000, 3, 32, 32], ""]}, {"nearest": 0}, {"precision_recall": False},
    {"num_classes": 10},
])
def test_another_checkpoint_sampler_seed_or_reference_is_another_evaluation(change):
    assert key_of(result(**change)) != key_of(result()) == key_of(result(step=None, fid=1.0))


def test_a_repeated_evaluation_replaces_the_earlier_one():
    kept = newest_of_each([result(fid=5.0), result(sample_N=1), result(fid=6.0)]).values()
    assert sorted((r["sample_N"], r["fid"]) for r in kept) == [(1, 4.5321), (2, 6.0)]


def test_the_protocol_line_says_what_a_reader_asks_for():
    line = protocol_line(result(class_label=3))
    assert "\n" not in line
    for part in ("FID 4.532", "100 samples", "euler-2 (NFE 2)", "EMA weights of checkpoint_1.pth", "step 500",
                 "seed 42", "class 3 alone", "truncation", "against CIFAR-10", "torch 2"):
        assert part in line


def test_pixel_distances_are_never_called_fid():
    pixels = {k: v for k, v in result(features="pixels", pixel_frechet_distance=0.3).items() if k != "fid"}
    assert "FID" not in protocol_line(pixels) + table([pixels])
    changed = protocol_line(result(eps=0.1, init_noise_scale=2.0, arithmetic="bf16"))
    assert "seed 42, eps 0.1, init_noise_scale 2, in bf16, uint8" in changed and "eps" not in protocol_line(result())
    assert "pixel Fréchet distance 0.3" in protocol_line(pixels)


def test_the_table_prints_na_for_what_the_reference_does_not_allow():
    *header, rule, row = table([result()]).splitlines()
    assert len(header[-1]) == len(row) == len(rule) < 120
    assert row.split()[-8:] == ["4.532", "n/a", "n/a", "n/a", "9.1", "1.5", "2", "3.0"]


@pytest.mark.parametrize("options, name", [
    ({"sampler": "rk45", "ode_tol": 1e-5, "step_control": "sample"}, "rk45"),
    ({"sampler": "rk45", "ode_tol": 0.01, "step_control": "sample"}, "rk45 tol 0.01"),
    ({"sampler": "rk45", "ode_tol": 1e-5, "step_control": "batch"}, "rk45 batch"),
    ({"sampler": "rk45", "ode_tol": 0.01, "step_control": "batch"}, "rk45 tol 0.01 batch"),
    ({"sampler": "heun", "sample_N": 1000, "rho": 1.0}, "heun-1000"),
    ({"sampler": "edm", "sample_N": 18, "sigma_max": 100.0, "sigma_min": 0.002}, "edm-18 max 100"),
    ({"sampler": "cm_stochastic", "sample_N": 2}, "cm_stochastic-2"),
])
def test_a_sampler_in_the_table_has_the_options_that_are_not_at_their_defaults(options, name):
    found = result(**{"sample_N": None} | options)
    assert re.search(f" 500 +{name} +2 +100 ", table([found]).splitlines()[-1])
    assert "tol 0.01" not in name or "rk45 (ode_tol 0.01, step_control " in protocol_line(found)


@pytest.mark.parametrize("checkpoint", ["checkpoint_26.pth", "2_rectified_flow_500000bigflow_28m_distill_lpips.pth"])
@pytest.mark.parametrize("options", [
    {"sampler": "rk45", "sample_N": None, "ode_tol": 1.23456e-4, "step_control": "batch"},
    {"sampler": "edm", "sample_N": 1000, "sigma_max": 151.25, "sigma_min": 1.23456e-4},
    {"sampler": "a_sampler_of_ones_own_with_a_very_long_name", "sample_N": 1000, "rho": 1.23456},
])
@pytest.mark.parametrize("metrics", [
    {"fid": 1234.567, "kid": -1.23456e-4, "precision": 0.0123456, "recall": 0.0123456, "inception_score": 9.87654},
    {"pixel_frechet_distance": 12345.67, "pixel_kernel_distance": -1.23456e-4, "pixel_precision": 0.0123456,
     "pixel_recall": 0.0123456}])
def test_rows_with_every_metric_stay_under_120_characters(checkpoint, options, metrics):
    plain = {name: value for name, value in result().items() if name not in results_module.TITLES}
    worst = plain | options | metrics | {
        "checkpoint": checkpoint, "step": 1300001, "nfe": 12345.67, "num_samples": 50000, "nn_distance": 12.34567,
        "nn_distance_real": 12.34567, "seconds": 123456.78}
    lines = table([worst, worst | {"nfe": 1.0}]).splitlines()
    assert max(map(len, lines)) < 120 and len(set(map(len, lines))) == 1
    assert options["sampler"][:3] in lines[-1] and (checkpoint[:4] in lines[-1] or " 26 " in lines[-1])


def test_the_figure_is_drawn_for_checkpoints_and_left_out_for_files(tmp_path):
    draw_figure(tmp_path / "none.png", [result(sampler=None, nfe=None)])
    assert not (tmp_path / "none.png").exists()
    draw_figure(tmp_path / "fid.png", [result(), result(step=900, sample_N=1, nfe=1.0)])
    assert (tmp_path / "fid.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """A function that returns the panels of the figure of some results."""
    def draw(results):
        drawn = []
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: (
            drawn.append(figure), path.write_bytes(b"")))
        draw_figure(tmp_path / "fid.png", results)
        return drawn[0].axes

    return draw


def test_the_figure_holds_every_target_and_names_it_with_the_number_of_samples(panels):
    others = [{"num_samples": 5000}, {"target": "x.npz", "reference": "x.npz"}, {"target_state": "12"}]
    drawn = panels([result(), *(result(fid=400.0, **change) for change in others), result(fid=5.0, step=900, digest=""),
                    result(fid=0.5, step=1000, digest="cd")])
    assert [axes.get_title(loc="left") for axes in drawn] == [
        "compared with CIFAR-10\n100 samples", "compared with CIFAR-10\n5,000 samples",
        "compared with x.npz\n100 samples", "compared with CIFAR-10\n100 samples"]
    assert [len(axes.lines[0].get_xdata()) for axes in drawn] == [3, 1, 1, 1]
    assert [axes.get_yscale() for axes in drawn] == ["log", "linear", "linear", "linear"]


def test_the_figure_has_a_line_a_sampler_over_steps_and_a_line_a_checkpoint_over_nfe(panels):
    """Labels tell what else differs: results of two seeds are no line."""
    left, right = panels([result(sample_N=n, nfe=float(n), step=step, digest=str(step), seeds={"samples": seed})
                          for step in (500, 900) for n, seed in ((1, 0), (5, 0), (5, 1))])
    assert [(line.get_label(), list(line.get_xdata())) for line in left.lines] == [
        (f"euler-{n}, seed {seed}", [500, 900]) for n, seed in ((1, 0), (5, 0), (5, 1))]
    assert [(line.get_label(), list(line.get_xdata())) for line in right.lines] == [
        (f"euler, step {step}, seed 0", [1, 5]) for step in (500, 900)]
    assert sorted(right.get_xticks()) == [1, 5]


@pytest.mark.parametrize("line", ['{"checkpoint": 3}', json.dumps(result(fid="4.5")), json.dumps(result(fid=None)),
                                  json.dumps(result(num_samples=None)), json.dumps(result(versions=[]))])
def test_a_line_that_is_no_result_is_left_out_and_counted(tmp_path, capsys, line):
    (tmp_path / "r.jsonl").write_text("\n".join([json.dumps(result()), line, json.dumps(result(fid=2.0))]))
    assert [r["fid"] for r in read_results(tmp_path / "r.jsonl")] == [4.5321, 2.0]
    assert "r.jsonl: 1 of 3 lines are not results" in capsys.readouterr().err
