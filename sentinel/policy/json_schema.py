"""The JSON Schema of policy files, made from the models that read them."""

from __future__ import annotations

from typing import Any

from sentinel.policy.schema import Policy


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of policy files, for editors and for other languages."""
    schema: dict[str, Any] = _as_toml_has_it(Policy.model_json_schema(by_alias=True))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Gradient Sentinel policy",
        **schema,
    }


def _as_toml_has_it(node: Any) -> Any:  # noqa: ANN401  any part of a JSON document
    """Drop null, which TOML does not have, and titles that only repeat the key."""
    if isinstance(node, list):
        return [_as_toml_has_it(part) for part in node]
    if not isinstance(node, dict):
        return node
    choices = [choice for choice in node.get("anyOf", ()) if choice != {"type": "null"}]
    node = {key: value for key, value in node.items() if key not in {"anyOf", "title"}}
    node = {key: value for key, value in node.items() if value is not None}
    if len(choices) == 1:
        node = {**choices[0], **node}
    elif choices:
        node["anyOf"] = choices
    return {key: _as_toml_has_it(value) for key, value in node.items()}
