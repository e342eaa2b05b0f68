"""What answers the policy between its turns: environments and tools, in processes of their own."""

from vlm_sapo.environments.environment import Environment, Observation, ToolResult
from vlm_sapo.environments.values import Box, Point

__all__ = ["Box", "Environment", "Observation", "Point", "ToolResult"]
