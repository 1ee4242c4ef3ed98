"""What all tables share. Invariants are CHECKs and partial unique indexes: no code path can break them."""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Text,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite only autoincrements INTEGER keys; PostgreSQL should not run out at 2^31.
BigKey = BigInteger().with_variant(Integer(), "sqlite")


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
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
        float: Double(),
        str: Text(),
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
