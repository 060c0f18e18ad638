"""Nouns as they may be given: the shapes of `resources`, where a misspelt field is refused instead of lost in silence.

What is shown may grow fields that an older reader skips; what is asked for must be understood whole. To a type checker
the two are one, so that whoever builds a request uses the plain resources.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .resources import AppSettings as AppSettingsInput
    from .resources import Attachment as AttachmentInput
    from .resources import ChannelFeatures as ChannelFeaturesInput
else:
    from . import resources

    class AttachmentInput(resources.Attachment, frozen=True, kw_only=True, forbid_unknown_fields=True):
        __doc__ = resources.Attachment.__doc__

    class AppSettingsInput(resources.AppSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
        __doc__ = resources.AppSettings.__doc__

    class ChannelFeaturesInput(resources.ChannelFeatures, frozen=True, kw_only=True, forbid_unknown_fields=True):
        __doc__ = resources.ChannelFeatures.__doc__


__all__ = ["AppSettingsInput", "AttachmentInput", "ChannelFeaturesInput"]
