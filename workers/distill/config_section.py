"""What every section of a run's config is: it knows its keys, and nothing changes them."""

from pydantic import BaseModel, ConfigDict


class ConfigSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
