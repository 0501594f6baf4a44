"""What is wrong with options is told before torch is loaded, which takes seconds."""

from __future__ import annotations

import subprocess
import sys

from fastmatch.cli.commands import SUMMARIES

PAIR = ["a.pt", "b.pt"]
BUILT = ["--model", "net.py:build"]
READ = [*BUILT, "--data", "net.py:loader"]
TOLD_WITHOUT_TORCH = {
    "align --outt o.pt": (["align", *PAIR, "--outt", "o.pt"], "did you mean '--out'?"),
    "align gone": (["align", "gone.pt", "b.pt", "--out", "o.pt"], "gone.pt: no such file or folder"),
    "align --seed -1": (["align", *PAIR, *BUILT, "--seed", "-1", "--out", "o.pt"], "--seed: expected a whole number"),
    "align --init": (["align", *PAIR, *BUILT, "--init", "gone.safetensors", "--out", "o.pt"], "gone.safetensors: no such file"),
    "align --epochs": (["align", *PAIR, *BUILT, "--epochs", "3", "--out", "o.pt"], "--epochs: is an option of"),
    "align --matcher": (["align", *PAIR, *BUILT, "--matcher", "fisher", "--out", "o.pt"], "--data: --matcher fisher needs"),
    "align --merge": (["align", *PAIR, "--merge", "2", "--out", "o.pt"], "--merge: expected"),
    "align, out exists": (["align", *PAIR, *BUILT, "--out", "there.pt"], "there.pt exists; choose another path"),
    "align out of core, out exists": (["align", *PAIR, *BUILT, "--out-of-core", "--out", "there.pt"], "there.pt exists"),
    "align folders, out exists": (["align", "folder", "folder", "--out", "there.pt"], "there.pt exists"),
    "align --resume": (["align", *PAIR, *BUILT, "--resume", "--out", "o.pt"], "--resume: is an option of --out-of-core"),
    "align --model": (["align", *PAIR, "--model", "net.py:bild", "--out", "o.pt"], "no callable 'bild'; did you mean 'build'?"),
    "align --data": (["align", *PAIR, *BUILT, "--data", "gone.py:f", "--matcher", "fisher", "--out", "o.pt"], "--data: no file gone.py"),
    "align-many --out": (["align-many", *PAIR, *BUILT, "--out", "o.pt", "p.pt"], "--out: expected 1 files"),
    "align-many --max-rounds": (["align-many", *PAIR, *BUILT, "--max-rounds", "0", "--out", "o.pt"], "--max-rounds: expected"),
    "align-many, out exists": (["align-many", *PAIR, *BUILT, "--out", "there.pt"], "there.pt exists"),
    "align-many gone": (["align-many", "a.pt", "gone", "--out", "o"], "gone: no such file or folder"),
    "plan gone": (["plan", "folder", "gone"], "gone: no such file or folder"),
    "plan --ranks": (["plan", "folder", "folder", "--ranks", "0"], "--ranks: expected"),
    "plan --device": (["plan", "folder", "folder", "--device", "toaster"], "invalid choice: 'toaster'"),
    "apply gone": (["apply", "gone.safetensors", "b.pt", "--out", "o.pt"], "gone.safetensors: no such file or folder"),
    "apply, no permutations": (["apply", "a.pt", "b.pt", "--out", "o.pt"], "permutations: expected the .safetensors file"),
    "merge --weights": (["merge", *PAIR, "--weights", "1", "--out", "o.pt"], "--weights: expected 2"),
    "merge, out exists": (["merge", *PAIR, "--out", "there.pt"], "there.pt exists"),
    "merge networks, out exists": (["merge", *PAIR, *BUILT, "--out", "there.pt"], "there.pt exists"),
    "merge --out": (["merge", *PAIR, "--out", "o.txt"], "--out: expected a file ending in"),
    "partial --data": (["partial", *PAIR, *BUILT, "--out", "o.pt2"], "--data: needed by --rule permute"),
    "partial --model": (
        ["partial", *PAIR, "--model", "net:bild", "--rule", "identity", "--out", "o.pt2"], "did you mean 'build'?",
    ),
    "renormalize --samples": (["renormalize", "a.pt", *READ, "--samples", "0", "--out", "o.pt"], "--samples: expected"),
    "renormalize --method": (["renormalize", "a.pt", *READ, "--method", "repare", "--out", "o.pt"], "did you mean 'repair'?"),
    "renormalize, out exists": (["renormalize", "a.pt", *READ, "--out", "there.pt"], "there.pt exists"),
    "pipeline gone": (["pipeline", "gone.yaml"], "gone.yaml: no such file"),
    "score --metric": (["score", *PAIR, *READ, "--metric", "net.py:lodr"], "--metric: 'net.py' has no callable 'lodr'"),
    "score gone": (["score", "gone.pt", *READ], "gone.pt: no such file or folder"),
    "curve --points": (["curve", *PAIR, *READ, "--points", "1"], "--points: expected a whole number of at least 3"),
    "curve --calibration": (["curve", *PAIR, *READ, "--renormalize", "repair"], "--calibration: needed by"),
    "triangle --points": (["triangle", *PAIR, "a.pt", *READ, "--points", "1"], "--points: expected"),
    "triangle --plot": (["triangle", *PAIR, "a.pt", *READ, "--plot", "o.txt"], "--plot: expected a file ending in"),
    "layers --endpoints": (["layers", *PAIR, *READ, "--endpoints", "c.pt"], "--endpoints: c.pt is not one of"),
    "distances gone": (["distances", "a.pt", "gone.pt"], "gone.pt: no such file or folder"),
    "distances, out exists": (["distances", *PAIR, "--out", "there.csv"], "there.csv exists"),
    "distances of one": (["distances", "a.pt"], "checkpoints: expected at least two, got 1"),
    "distances, twice": (["distances", "a.pt", "a.pt"], "checkpoints: expected different ones; a.pt is there twice"),
    "distances --force": (["distances", *PAIR, "--force"], "--force: replaces --out, and none is given"),
    "curve --force": (["curve", *PAIR, *READ, "--force"], "--force: replaces --out and --plot, and none is given"),
    "distances --model": (["distances", *PAIR, *BUILT], "unknown: --model"),
    "inspect": (["inspect"], "--model: give a network"),
    "inspect gone": (["inspect", "gone"], "gone: no such file or folder"),
    "inspect --model": (["inspect", "--model", "build"], "--model: expected module:callable"),
    "verify gone": (["verify", "a.pt", "gone.pt"], "gone.pt: no such file or folder"),
    "verify --tolerance": (["verify", *PAIR, "--tolerance", "-1"], "--tolerance: expected"),
    "demo --width": (["demo", "--width", "100000"], "--width: expected 128 to 8192"),
    "study --points": (["study", "--points", "4"], "--points: expected an odd number"),
    "study --seeds": (["study", "--seeds", "-1"], "--seeds: expected a whole number"),
    "study --data": (["study", "--data", "gone.py:f"], "--data: no file gone.py"),
    "bench": (["bench", "asignment"], "suite: expected some of"),
    "run": (["run", "gone.py"], "no file gone.py"),
    "libraries": (["libraries", "--all"], "unknown: --all"),
    "warm-up": (["warm-up", "now"], "unknown: now"),
    "completion": (["completion", "fish"], "invalid choice: 'fish'"),
}  # fmt: skip
"""Command lines that are wrong as they are typed -> what is said."""


def test_what_is_wrong_with_options_is_told_before_torch_is_loaded(tmp_path):
    """Every command's help too. All in one process: none of them may load torch."""
    for name in (*PAIR, "c.pt", "there.pt", "there.csv", "folder/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "net.py").write_text("import torch\n\ndef build():\n    pass\n\ndef loader():\n    pass\n")
    lines = [*(line for line, _ in TOLD_WITHOUT_TORCH.values()), *([name, "--help"] for name in SUMMARIES)]
    code = (
        "import sys\nfrom fastmatch.cli.main import main\n"
        f"for line in {lines}:\n    print('>', line, file=sys.stderr)\n"
        "    try:\n        main(line)\n    except SystemExit:\n        pass\n"
        "    assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    told = done.stderr.split("\n> ")
    for (name, (_, message)), said in zip(TOLD_WITHOUT_TORCH.items(), told, strict=False):
        assert message in said, name
    assert {line[0] for line, _ in TOLD_WITHOUT_TORCH.values()} == set(SUMMARIES)
