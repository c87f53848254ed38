"""Requests of which nothing is passed over: what a route doesn't take is refused, and what is given twice."""

from __future__ import annotations

import json
from typing import get_args, get_origin

from fastapi import HTTPException, Request
from fastapi.routing import APIRoute

from ...files.json_files import without_duplicates
from ...names.registry import nearest


class StrictRoute(APIRoute):
    """A route that refuses a JSON body with a name twice, of which the last would win."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def strict(request: Request):
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self):
        try:
            return json.loads(await self.body(), object_pairs_hook=without_duplicates)
        except (json.JSONDecodeError, UnicodeDecodeError):
            return await super().json()  # raises the same, which FastAPI knows how to answer
        except ValueError as error:
            raise HTTPException(422, f"the body: {error}") from error


async def refuse_unknown(request: Request):
    """A ValueError where a request has parameters or fields of a form that its route doesn't take, or takes once."""
    route = request.scope["route"].dependant
    given = {"parameter": (request.query_params, route.query_params)}
    if request.headers.get("content-type", "").startswith(
        ("multipart/form-data", "application/x-www-form-urlencoded")
    ):
        given["field"] = (await request.form(), route.body_params)
    for kind, (values, fields) in given.items():
        known = {item.alias: _takes_several(item.field_info.annotation) for item in fields}
        names = [name for name, _ in values.multi_items()]
        for name in names:
            if name not in known:
                raise ValueError(f"there is no {kind} {name!r}{nearest(name, known)}; there are {list(known)}")
            if not known[name] and names.count(name) > 1:
                raise ValueError(f"the {kind} {name!r} is there twice")


def _takes_several(annotation):
    return get_origin(annotation) is list or any(map(_takes_several, get_args(annotation)))


def columns_of(text):
    """Columns of a form, as JSON.

    Raises:
        ValueError: not a JSON object of texts, numbers and nulls, or a name is there twice.
    """
    try:
        values = json.loads(
            text,
            parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)),
            object_pairs_hook=without_duplicates,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"columns must be a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"columns must be a JSON object, got {text[:50]!r}")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"columns: {name} must be a text, a number or null, got {value!r}")
    return values


__all__ = ["StrictRoute", "columns_of", "refuse_unknown"]
