"""/v1/responses: a conversation's next answer, and what of earlier ones is kept."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response

from server.engine.async_engine import AsyncEngine
from server.engine.request import FinishReason, RequestOutput
from server.engine.tool_reader import CallDelta, ToolReader
from server.errors import Cancelled, InvalidRequest, NotFound, UserError
from server.protocol.chat import ChatCompletionRequest
from server.protocol.logprobs import chat_logprobs, namer
from server.protocol.response_answers import (
    DeletedResponse,
    InputItemList,
    ResponsesResponse,
    response_fields,
    usage_fields,
)
from server.protocol.responses import Item, ItemReference, ResponsesRequest, call_item, item_of, message_item, renamed
from server.routes.body import JsonRoute
from server.routes.chat import ChatCall, accept
from server.routes.described import WITH_ENGINE, responses
from server.routes.limits import check_count
from server.routes.one_place import check_stateless
from server.routes.prompts import check_model
from server.routes.requests import Running
from server.routes.respond import JsonPieces, in_pieces, json_parts, to_json, while_connected
from server.routes.response_store import ResponseStore, Stored
from server.routes.stream import named_event_stream
from server.routes.waiting import with_comments
from server.settings import Settings

LEVELS = 5
ID = Path(description="A response's `id`.", examples=["resp_4f1c"])
EVENTS = {
    "text/event-stream": {
        "example": 'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "delta": " a"}\n\n'
    }
}


Event = tuple[str, dict[str, Any]]
"""Its type, and its fields as they are until the next event is taken."""


@dataclass
class _Run:
    """A response that is generated."""

    call: ChatCall
    response: dict[str, Any]
    history: list[Item]
    own: int  # items of the request itself, at the end of the history

    def snapshot(self) -> dict[str, Any]:
        """The response as it is now. Items are replaced field by field, so that what these hold stays as it is."""
        return {**self.response, "output": [dict(item) for item in self.response["output"]]}

    async def events(
        self, cancelled: asyncio.Future[None], keep: Callable[[_Run], Awaitable[bool]]
    ) -> AsyncGenerator[Event]:
        """What happens to the response until it ends or is `cancelled`. An error before the first output is raised,
        later ones are told.

        `keep` stores it before its last event, and says whether it has.
        """
        output, begun, cut = _Output(self), False, False
        status = "completed"
        try:
            async with aclosing(self._outputs(cancelled)) as outputs:
                async for found in outputs:
                    if not begun:
                        begun = True
                        yield "response.created", {"response": self.response}
                        yield "response.in_progress", {"response": self.response}
                    for event in output.add(found):
                        yield event
                    cut = found.finish_reason is FinishReason.LENGTH
            if cut:
                status, self.response["incomplete_details"] = "incomplete", {"reason": "max_output_tokens"}
        except UserError as error:
            told = renamed(error)
            if not begun:
                raise told from None
            status = "cancelled" if isinstance(told, Cancelled) else "failed"
            if status == "failed":
                self.response["error"] = {"code": told.code or told.type, "message": told.message}
        for event in output.end("completed" if status == "completed" else "incomplete"):
            yield event
        generation = self.call.generation
        prompt = sum(len(prompt.token_ids) for prompt in generation.prompts)
        cached = sum(generation.cached_tokens.values())
        self.response["usage"] = usage_fields(prompt, generation.completion_tokens, cached)
        self.response["status"] = status
        self.response["completed_at"] = int(time.time()) if status == "completed" else None
        self.response["store"] = self.response["store"] and await keep(self)
        # there is no event of its own for a cancelled response
        yield f"response.{'failed' if status == 'cancelled' else status}", {"response": self.response}

    async def _outputs(self, cancelled: asyncio.Future[None]) -> AsyncGenerator[RequestOutput]:
        """Raises Cancelled when it is cancelled."""
        async with aclosing(self.call.generation.run()) as outputs:
            while True:
                taking = asyncio.ensure_future(anext(outputs, None))
                try:
                    await asyncio.wait((taking, cancelled), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not taking.done():
                        taking.cancel()
                        await asyncio.gather(taking, return_exceptions=True)
                if taking.cancelled():
                    raise Cancelled
                if (found := taking.result()) is None:
                    return
                yield found[1]


class _Output:
    """The items of a response, out of pieces of text."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._items: list[Item] = run.response["output"]
        self._reader: ToolReader | None = None if run.call.choice is None else run.call.reader()
        self._text = ""  # of the message that is open
        self._logprobs: list[Any] = []
        self._arguments = ""  # of the call that is open
        self._open = False  # whether the last item is

    def add(self, output: RequestOutput) -> Iterator[Event]:
        """The events of one output."""
        text, deltas = output.text, list[CallDelta]()
        if self._reader is not None:
            text, deltas = self._reader.feed(output.text, last=output.finish_reason is not None)
        rows = self._rows(output)
        if text or rows:
            yield from self._add_text(text, rows)
        for delta in deltas:
            if delta.name is not None:
                yield from self._close("completed")
                assert self._reader is not None
                call = self._reader.calls[delta.index]
                yield from self._begin(call_item(_new_id("fc"), call.id, call.name, "", "in_progress"))
                self._arguments = ""
            if delta.arguments:
                self._arguments += delta.arguments
                yield self._of_item("response.function_call_arguments.delta", delta=delta.arguments)

    def end(self, status: str) -> Iterator[Event]:
        """The last item's end; a response has at least one."""
        if not self._items:
            yield from self._add_text("", [])
        yield from self._close(status)

    def _rows(self, output: RequestOutput) -> list[Any]:
        if output.logprobs is None or (self._reader is not None and self._reader.calls):
            return []
        tokenizer = self._run.call.generation.engine.tokenizer
        top, name = self._run.call.body.alternatives or 0, namer(tokenizer, as_ids=False)
        found: list[Any] = chat_logprobs(tokenizer, name, output.token_ids, output.logprobs, top)["content"]
        return found

    def _add_text(self, text: str, rows: list[Any]) -> Iterator[Event]:
        if not self._open or self._items[-1]["type"] != "message":
            yield from self._close("completed")
            item = message_item(_new_id("msg"), "assistant", "", "in_progress")
            (part,) = item["content"]
            item["content"] = []
            yield from self._begin(item)
            yield self._of_part("response.content_part.added", part=part)
            self._text, self._logprobs = "", []
        self._text += text
        self._logprobs += rows
        if text:
            yield self._of_part("response.output_text.delta", delta=text, logprobs=rows)

    def _begin(self, item: Item) -> Iterator[Event]:
        self._items.append(item)
        self._open = True
        yield "response.output_item.added", {"output_index": len(self._items) - 1, "item": item}

    def _close(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        item = self._items[-1]
        if item["type"] == "message":
            item |= message_item(item["id"], "assistant", self._text, status, self._logprobs)
            yield self._of_part("response.output_text.done", text=self._text, logprobs=self._logprobs)
            yield self._of_part("response.content_part.done", part=item["content"][0])
        else:
            item |= {"arguments": self._arguments, "status": status}
            arguments = {"name": item["name"], "arguments": self._arguments}
            yield self._of_item("response.function_call_arguments.done", **arguments)
        yield "response.output_item.done", {"output_index": len(self._items) - 1, "item": item}
        self._open = False

    def _of_item(self, kind: str, **fields: Any) -> Event:
        return kind, {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, content_index=0, **fields)


class _Responses:
    """One server's responses: those that run, and those that are kept."""

    def __init__(self, engine: AsyncEngine, settings: Settings, requests: Running) -> None:
        self._engine, self._settings, self._requests = engine, settings, requests
        self.store = ResponseStore(settings.max_stored_responses, settings.max_stored_bytes)
        self.running: dict[str, _Run] = {}

    async def begin(self, body: ResponsesRequest, request_id: str) -> _Run:
        """Refuse what the model cannot do, or what is not there."""
        check_model(body.model, self._settings)
        if self._settings.ray_replicas is not None:
            check_stateless(body)
        before: list[Item] = []
        if body.previous_response_id is not None:
            if (stored := self.store.get(body.previous_response_id)) is None:
                raise InvalidRequest(
                    f"previous_response_id: {body.previous_response_id[:64]!r} is not stored (any more); send the "
                    "conversation as input",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            before = stored.conversation
        check_count("input", "items", len(before) + len(body.input), self._settings.max_messages, "max_messages")
        given = [self._resolved(item, f"input[{i}].id") for i, item in enumerate(body.input)]

        def chat() -> tuple[ChatCompletionRequest, list[Item]]:
            items = before + [item if isinstance(item, dict) else item_of(item, _new_id("item")) for item in given]
            return body.chat(items), items

        try:
            of_chat, items = await asyncio.to_thread(chat)
            call = await accept(self._engine, self._settings, of_chat, request_id)
        except UserError as error:
            raise renamed(error) from None
        params = call.generation.params
        sampling = {"temperature": params.temperature, "top_p": params.top_p}
        response_id, now = _new_id("resp"), int(time.time())
        response = response_fields(body, response_id, now, self._settings.model_name, sampling)
        return _Run(call, response, items, len(given))

    def _resolved(self, item: Any, where: str) -> Any:
        """An item of a request, or the stored one that it refers to."""
        if not isinstance(item, ItemReference):
            return item
        if (found := self.store.item(item.id)) is None:
            raise InvalidRequest(f"{where}: {item.id[:64]!r} is no item of a stored response", param=where)
        return found

    async def events(self, run: _Run) -> AsyncGenerator[Event]:
        """The events of a response, which can be found meanwhile."""
        self.running[run.response["id"]] = run
        try:
            with self._requests.entry(run.response["id"]) as cancelled:
                async with aclosing(run.events(cancelled, self._keep)) as events:
                    async for event in events:
                        yield event
        finally:
            del self.running[run.response["id"]]

    async def _keep(self, run: _Run) -> bool:
        def size() -> int:
            parts = json_parts([run.response, run.history], LEVELS)
            return sum(len(part.encode(errors="replace")) for part in parts)

        if not self.store.fits(num_bytes := await asyncio.to_thread(size)):
            return False
        self.store.put(run.response["id"], Stored(run.response, run.history, run.own, num_bytes))
        return True

    def find(self, response_id: str) -> dict[str, Any]:
        """A response that runs, as it is now, or is kept. Raises NotFound."""
        if (run := self.running.get(response_id)) is not None:
            return run.snapshot()
        return self.stored(response_id).response

    def stored(self, response_id: str) -> Stored:
        """Raises NotFound."""
        if (stored := self.store.get(response_id)) is None:
            raise _not_found(response_id)
        return stored


def responses_router(engine: AsyncEngine, settings: Settings, requests: Running) -> APIRouter:
    """The routes over one engine."""
    router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)
    ours = _Responses(engine, settings, requests)
    described = responses(ResponsesResponse, *WITH_ENGINE)
    described[200]["content"] = EVENTS

    @router.post("/v1/responses", summary="Answer a conversation, which is kept", responses=described)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """The model's next answer: a text, or calls of functions."""
        run = await ours.begin(body, request.state.request_id)
        events = ours.events(run)
        if body.stream:
            return named_event_stream(with_comments(_texts(events), settings.waiting_comment_interval))
        await while_connected(request.receive, _exhaust(events))
        if run.response["status"] == "cancelled":
            raise Cancelled
        return await _large(run.response)

    @router.get(
        "/v1/responses/{response_id}", summary="A stored response", responses=responses(ResponsesResponse, 400, 404)
    )
    async def retrieve(
        response_id: str = ID, stream: bool = Query(False, description="Only false: no events are kept.")
    ) -> Response:
        """A response that is kept, or is generated now."""
        if stream:
            raise InvalidRequest("stream: the events of a response are not kept", param="stream")
        return await _large(ours.find(response_id))

    @router.delete("/v1/responses/{response_id}", summary="Forget a response", responses=responses(None, 404))
    async def delete(response_id: str = ID) -> DeletedResponse:
        """Responses that were given after it keep their conversation."""
        if not ours.store.remove(response_id):
            raise _not_found(response_id)
        return DeletedResponse(id=response_id)

    @router.get(
        "/v1/responses/{response_id}/input_items",
        summary="What a response answers",
        responses=responses(InputItemList, 400, 404),
    )
    async def input_items(
        response_id: str = ID,
        limit: int = Query(20, ge=1, le=100, description="Most items."),
        order: Literal["asc", "desc"] = Query("desc", description="desc: the newest first."),
        after: str | None = Query(None, description="The id of the item before the first one."),
    ) -> Response:
        """The items of its own request."""
        stored = ours.stored(response_id)
        items = list(stored.history[len(stored.history) - stored.own :])
        if order == "desc":
            items.reverse()
        if after is not None:
            places = [i for i, item in enumerate(items) if item["id"] == after]
            if not places:
                raise InvalidRequest(f"after: {after[:64]!r} is no item of this response", param="after")
            items = items[places[0] + 1 :]
        page = items[:limit]
        ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        found = {"first_id": ends[0], "last_id": ends[1], "has_more": len(items) > len(page)}
        return await _large({"object": "list", "data": page, **found})

    @router.post(
        "/v1/responses/{response_id}/cancel",
        summary="Cancel a response",
        responses=responses(ResponsesResponse, 400, 404),
    )
    async def cancel(response_id: str = ID) -> Response:
        """End a response that is generated; its stream ends with response.failed, or its request with a 499. One that
        is cancelled already is answered as it is."""
        response = ours.find(response_id)
        if response["status"] == "in_progress":
            requests.cancel(response_id)
            response["status"] = "cancelled"
        elif response["status"] != "cancelled":
            raise InvalidRequest(
                f"id: the response is {response['status']}; only one that is in progress can be cancelled", param="id"
            )
        return await _large(response)

    return router


def _not_found(response_id: str) -> NotFound:
    return NotFound(f"id: no response {response_id[:64]!r} is stored (any more)", param="id", code="response_not_found")


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(24)}"


async def _exhaust(events: AsyncGenerator[Event]) -> None:
    async with aclosing(events):
        async for _ in events:
            pass


async def _texts(events: AsyncGenerator[Event]) -> AsyncGenerator[str]:
    """Events as they are sent; only pieces of text are small for sure, and encoded in the event loop."""
    number = 0
    async with aclosing(events):
        async for kind, fields in events:
            data = {"type": kind, "sequence_number": number, **fields}
            if kind.endswith(".delta"):
                text = to_json(data)
            else:
                text = await asyncio.to_thread(_text, data)
            yield f"{kind}\ndata: {text}"
            number += 1


def _text(value: dict[str, Any]) -> str:
    return "".join(json_parts(value, LEVELS))


async def _large(value: dict[str, Any]) -> Response:
    """200 with JSON that may be large, made beside the event loop."""
    return JsonPieces(await asyncio.to_thread(lambda: in_pieces(json_parts(value, LEVELS))))
