"""The fields of the page that follow from what is typed in others. Imports no torch."""

from __future__ import annotations

from launcher.config import overrides
from launcher.ui import form, override_syntax
from launcher.ui.form import Values

IMPLYING_FIELDS = tuple(each.setting for each in overrides.IMPLIED if each.setting in form.FIELDS)


def with_implied(values: Values) -> Values:
    """`values` with what the typed ones imply, so that the page shows what will run.

    Raises UserError for a value that the page does not accept.
    """
    changed = dict(values)
    for each in overrides.implied(form.overrides_of(values)):
        key, text = overrides.key_of(each.override), each.override.partition("=")[2]
        if key not in form.HYDRA_GROUPS:
            changed[key] = override_syntax.parse_field(key, text)
        elif values[key] == each.replaces:
            initial = form.initial_values(
                {group: str(values[group]) for group in form.HYDRA_GROUPS}
            )
            typed = {name: value for name, value in values.items() if value != initial.get(name)}
            changed = {**form.switch_file({**changed, key: text}, key), **typed}
    return changed
