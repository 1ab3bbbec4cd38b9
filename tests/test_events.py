"""TensorBoard's events: resumed runs replace some, and a full disk is an error."""

import pytest
from conftest import no_file_above, scalars

from qpenet_jax.training.events import Events


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    """Also where the clock was turned back, by an hour before the last."""
    for start, value in ((0, 1.0), (2, 2.0), (4, 3.0)):
        if start == 4:
            last = max((tmp_path / "new").iterdir())
            before, time, host = last.name.split(".", 4)[2:]
            later = f"events.out.{before}.{int(time) + 3600 * 10**9}.{host}"
            last.rename(last.with_name(later))
        with Events(tmp_path / "new", purge_step=start + 1) as events:
            for step in range(start + 1, start + 6):
                events.add_scalar("loss", value, step)
    assert len(list((tmp_path / "new").iterdir())) == 3
    values = scalars(tmp_path / "new", "loss")
    assert values == {1: 1, 2: 1, 3: 2, 4: 2, **dict.fromkeys(range(5, 10), 3)}


def test_a_full_disk_raises_and_what_was_written_stays(tmp_path):
    """It is the size of a file that is limited here."""
    with Events(tmp_path) as events:
        events.add_scalar("loss", 1.0, 1)
        (file,) = tmp_path.iterdir()
        with (
            no_file_above(file.stat().st_size),
            pytest.raises(OSError, match="File too large"),
        ):
            events.add_scalar("loss", 2.0, 2)
    assert scalars(tmp_path, "loss")[1] == 1
