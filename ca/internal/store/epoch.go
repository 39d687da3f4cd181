package store

// Epochs. A store that was restored from a backup has lost its latest
// revisions, and others remember them: serial numbers carry them, agents have
// seen what was written at them. It therefore goes on in the next epoch, above
// every revision that the lost one can have given out.

import "fmt"

// epochBits is how many revisions an epoch has; a serial number keeps 39 bits
// of a revision, so there are 32 768 epochs.
const epochBits = 32

// Epoch tells how often the store at revision was restored.
func Epoch(revision uint64) uint64 { return revision >> epochBits }

// EpochStart returns the first revision of the epoch of revision.
func EpochStart(revision uint64) uint64 { return Epoch(revision) << epochBits }

// NextEpoch returns the first revision of the epoch after that of revision.
func NextEpoch(revision uint64) uint64 { return EpochStart(revision) + 1<<epochBits }

// InEpoch returns the number after last that says it was made in the epoch of
// revision: numbers that rise by one, such as the sequence number of a trust
// bundle, jump with the epoch.
func InEpoch(revision, last uint64) uint64 { return max(last+1, EpochStart(revision)) }

// BeforeEpoch says whether number was made in an earlier epoch than that of
// revision: whoever remembers what came after it must not find it again.
func BeforeEpoch(revision, number uint64) bool { return Epoch(number) < Epoch(revision) }

// OlderError is returned for a store at Revision that belongs to an earlier
// epoch than one that is known to have begun, at Seen: an earlier state of it
// was put back, and would give out numbers again.
type OlderError struct{ Revision, Seen uint64 }

// Error implements error.
func (e *OlderError) Error() string {
	return fmt.Sprintf("the store is at revision %d, in epoch %d, and epoch %d has begun already: an earlier state of it was put back, and would give out numbers again",
		e.Revision, Epoch(e.Revision), Epoch(e.Seen))
}

// CheckEpoch returns an *OlderError where the epoch of revision comes before
// that of seen.
func CheckEpoch(revision, seen uint64) error {
	if BeforeEpoch(seen, revision) {
		return &OlderError{revision, seen}
	}
	return nil
}
