"""An audit leaves the process as it was."""

import gc

from unlora.audits.subject import collecting_soon


def test_what_a_program_has_frozen_is_frozen_after_an_audit_and_nothing_else():
    try:
        for frozen_before in (True, False):
            gc.freeze() if frozen_before else gc.unfreeze()
            with collecting_soon():
                assert gc.get_freeze_count() > 0
            assert (gc.get_freeze_count() > 0) is frozen_before
    finally:
        gc.freeze()  # as conftest.py has it
