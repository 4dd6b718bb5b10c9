"""The list of the faults, with what catches each."""

from tests.faults.faults_of_batches import BATCHES_AND_LEDGERS
from tests.faults.faults_of_correlated_noise import CORRELATED_NOISE
from tests.faults.faults_of_mixing import MIXING
from tests.faults.faults_of_noise import CLIPPING_AND_NOISE
from tests.faults.faults_of_sums import SUMS

FAULTS = [*CLIPPING_AND_NOISE, *CORRELATED_NOISE, *BATCHES_AND_LEDGERS, *SUMS, *MIXING]
