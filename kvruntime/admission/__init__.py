"""Many generations on one pool: which may start, which may go on, which must wait."""

from kvruntime.admission.admission import Admission, AdmissionStats
from kvruntime.admission.ticket import Ticket

__all__ = ["Admission", "AdmissionStats", "Ticket"]
