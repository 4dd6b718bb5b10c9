"""``python -m lora_dp.fed audit CONFIG``: does a configuration's training keep the ε that it claims?"""

from lora_dp.fed.auditing.command import AuditConfig, audit_config

__all__ = ["AuditConfig", "audit_config"]
