"""`residency methods`: how models can be trained, and what may be asked of each method."""

import json
from typing import Annotated, Any

import typer

from api.client import ClientError, connect
from api.commands.output import AsJson, out, print_fields, print_json, print_table


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None, *, as_json: AsJson = False
) -> None:
    """List the training methods, or the parameters of one."""
    found = connect().get("/v1/methods")["data"]
    if name is None:
        _show_all(found, as_json=as_json)
        return
    method = next((each for each in found if each["name"] == name), None)
    if method is None:
        known = ", ".join(each["name"] for each in found)
        raise ClientError(f"There is no method '{name}' here; there are: {known}.")
    if as_json:
        print_json(method)
        return
    print_fields(
        {
            "name": method["name"],
            "summary": method["summary"],
            "learns from": f"{method['learns_from']} rows",
            **{f"  {form['name']}": _describe_row(form["example"]) for form in method["row_formats"]},
        }
    )
    out.print()
    print_table(
        ("PARAMETER", "DEFAULT", "VALUES", "MEANING", "OTHER NAMES"),
        (
            (
                parameter["name"],
                "required" if parameter["required"] else json.dumps(parameter["default"]),
                _describe_values(parameter),
                parameter["description"],
                ", ".join(parameter["aliases"]),
            )
            for parameter in method["parameters"]
        ),
        empty="It has no parameters.",
    )


def _show_all(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    print_table(
        ("METHOD", "LEARNS FROM", "SUMMARY"),
        ((method["name"], method["learns_from"], method["summary"]) for method in found),
        empty="No methods.",
    )


def _describe_row(example: Any) -> str:
    return example if isinstance(example, str) else json.dumps(example)


def _describe_values(parameter: dict[str, Any]) -> str:
    """`auto; integer, 1 to 50`: the words that are taken, the other types, and their bounds."""
    types = [name for name in parameter["types"] if name != "string" or not parameter["choices"]]
    words = ", ".join(parameter["choices"] or [])
    bounds = [
        f"{sign} {parameter[key]}"
        for key, sign in (
            ("minimum", "from"),
            ("exclusive_minimum", "above"),
            ("maximum", "to"),
            ("exclusive_maximum", "below"),
        )
        if parameter[key] is not None
    ]
    numbers = " ".join([" or ".join(types), *bounds])
    return "; ".join(part for part in (words, numbers) if part)
