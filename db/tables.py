"""What all tables share. Invariants are CHECKs and partial unique indexes: no code path can break them."""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite only autoincrements INTEGER keys; PostgreSQL should not run out at 2^31.
BigKey = BigInteger().with_variant(Integer(), "sqlite")


def storable(value: Any) -> Any:
    """`value` without what databases refuse in a text, in all its strings: as the words `\\0` and `\\udc80`.

    PostgreSQL takes no NUL and nobody half of a surrogate pair. What clients send is refused long before; but
    a job could not end whose trainer's last words held such a thing.
    """
    if isinstance(value, str):
        if value.isascii() and "\0" not in value:
            return value
        return value.encode(errors="backslashreplace").decode().replace("\0", "\\0")
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    return value


class AnyText(TypeDecorator[str]):
    """Text that may come from anywhere."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """What is stored for `value`."""
        return storable(value)


class AnyJSON(TypeDecorator[Any]):
    """JSON whose strings may come from anywhere."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        """What is stored for `value`."""
        return storable(value)

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        """An index into the document is none itself."""
        return JSON().coerce_compared_value(op, value)


class Base(DeclarativeBase):
    """Times are Unix seconds (double precision); ids are text with a prefix that names their kind."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own declaration form)
        dict[str, Any]: AnyJSON(),
        list[Any]: AnyJSON(),
        float: Double(),
        str: AnyText(),
    }


def one_of(column: str, values: tuple[str, ...] | frozenset[str] | dict[str, Any]) -> CheckConstraint:
    """That a column has one of these values, of a mapping one of its keys."""
    listed = ", ".join(f"'{value}'" for value in sorted(values))
    return CheckConstraint(f"{column} IN ({listed})", name=column)


def unique_where(name: str, *columns: str, where: str) -> Index:
    """That no two rows for which `where` holds have the same columns."""
    return Index(name, *columns, unique=True, sqlite_where=text(where), postgresql_where=text(where))


class Org(Base):
    """A tenant. Every owned row names one."""

    __tablename__ = "orgs"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]


class Owned:
    """What belongs to a tenant; read it through `db.scope.scoped`."""

    org_id: Mapped[str] = mapped_column(ForeignKey("orgs.id"))
