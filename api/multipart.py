"""Multipart uploads, parsed while they arrive: the file goes to the blob store and nowhere else."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from api.errors import ApiError
from api.intake import Intake
from api.middleware import allow_body
from db.blobs import BlobWriter

# What a form may hold beside the file.
FORM_OVERHEAD_BYTES = 64 * 1024
_MAX_PARTS = 16
_FILENAME_MAX_CHARS = 255


class UploadForm:
    """The text fields of a form and the name of its one file, the field `file_field`.

    Collects the file's bytes until they are taken.
    """

    def __init__(self, *, file_field: str, max_file_bytes: int) -> None:
        self._file_field = file_field
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.complete = False
        self._pending: list[bytes] = []
        self._file_bytes, self._max_file_bytes = 0, max_file_bytes
        self._parts = 0
        self._header_name, self._header_value = b"", b""
        self._name, self._in_file, self._text = "", False, b""

    def parser(self, boundary: bytes) -> MultipartParser:
        """A parser that feeds this form. Raises FormParserError for an impossible boundary."""
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._read_header_name,
                "on_header_value": self._read_header_value,
                "on_header_end": self._end_header,
                "on_part_data": self._read_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def take(self) -> list[bytes]:
        """The file's bytes since the last call."""
        taken, self._pending = self._pending, []
        return taken

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise ApiError(400, "invalid_form", f"The form has more than {_MAX_PARTS} parts.")
        self._name, self._in_file, self._text = "", False, b""

    def _read_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _read_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            self._name = options.get(b"name", b"").decode(errors="replace")
            if b"filename" in options:
                self._open_file(options[b"filename"].decode(errors="replace"))
        self._header_name, self._header_value = b"", b""

    def _open_file(self, filename: str) -> None:
        if self._name != self._file_field:
            raise _unknown_field(self._name)
        if self.filename is not None:
            raise ApiError(400, "invalid_form", "The form has more than one file.", param=self._name)
        self.filename, self._in_file = label(filename), True

    def _read_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._text += data[start:end]
            if len(self._text) > FORM_OVERHEAD_BYTES:
                raise ApiError(
                    400, "invalid_form", f"The field '{self._name}' is too long.", param=self._name
                )
            return
        self._file_bytes += end - start
        if self._file_bytes > self._max_file_bytes:
            message = f"The file has more than the {self._max_file_bytes} bytes allowed."
            raise ApiError(413, "file_too_large", message, param=self._file_field)
        self._pending.append(data[start:end])

    def _end_part(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._text.decode(errors="replace")

    def _end(self) -> None:
        self.complete = True


async def read_upload(
    request: Request, writer: BlobWriter, *, file_field: str, max_file_bytes: int
) -> UploadForm:
    """Read the form of `request`, its file into `writer`.

    Raises ApiError (400, 413), ClientDisconnect, OSError.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise ApiError(400, "invalid_form", "The body must be a form (Content-Type: multipart/form-data).")
    allow_body(request, limit_bytes=max_file_bytes + FORM_OVERHEAD_BYTES)
    form = UploadForm(file_field=file_field, max_file_bytes=max_file_bytes)
    try:
        parser = form.parser(options[b"boundary"])
        async with Intake(writer) as intake:
            async for chunk in request.stream():
                parser.write(chunk)
                await intake.add(*form.take())
    except FormParserError as error:
        raise ApiError(400, "invalid_form", "The body is not a valid multipart form.") from error
    if not form.complete:
        raise ApiError(400, "invalid_form", "The form ends before its last boundary.")
    return form


def label(filename: str) -> str:
    """A client's name for a file as something harmless to show: no folders, nothing unprintable."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    shown = "".join(character for character in last if character.isprintable())[-_FILENAME_MAX_CHARS:]
    return shown if shown.strip(". ") else "upload"


def _unknown_field(name: str) -> ApiError:
    return ApiError(400, "unknown_parameter", f"Unknown parameter: '{name}'.", param=name)
