"""The host's share of a call: every route and file of it is in the tables."""

from . import host_share


def test_tables(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["host_share", "--seconds", "0.1", "--top", "2"])
    monkeypatch.setattr(host_share, "CALLS", 3)
    host_share.main()
    lines = capsys.readouterr().out.splitlines()
    times = [line.split(" | ") for line in lines if line.startswith(("| two-layer chain", "| MNIST VAE"))]
    assert [row[1] for row in times] == 2 * [
        "forward and backward",
        "factors and norm",
        "training step watched, and norm",
        "norm",
    ]
    assert all(float(row[2]) > 0 for row in times)
    assert sum(line.startswith("| torch and Python |") for line in lines) == 2
