package badger

// What is said of a store that has lost something.

import (
	"fmt"
	"strings"
)

// DamagedError is returned by Open for a store in which acknowledged writes are
// missing. The folder is left as it was found.
type DamagedError struct {
	Dir    string
	Reason string
	// LastGood is the last revision up to which everything is there; 0 if there
	// is none.
	LastGood uint64
	// First and Last are the revisions that are missing. First is 0 if it is not
	// known which of those up to Last, Last if it is not known how many there were.
	First, Last uint64
	// Refused is the revision that Options.AcceptOlder named, if it is not
	// LastGood.
	Refused uint64
}

// Error says what is missing and what to do.
func (e *DamagedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "store %s is damaged: %s; %s. ", e.Dir, e.Reason, e.loss())
	if e.Refused != 0 && e.LastGood != 0 {
		fmt.Fprintf(&b, "-accept-older-store=%d is not the last good revision. ", e.Refused)
	}
	fmt.Fprintf(&b, "Nothing was changed. Inspect it with: merlon store verify %s. Restore a backup", e.Dir)
	if e.LastGood != 0 {
		fmt.Fprintf(&b, ", or go on without what is missing: merlon-ca -accept-older-store=%d", e.LastGood)
	}
	return b.String()
}

// loss names the last good revision and the missing ones.
func (e *DamagedError) loss() string {
	good := "no revision is whole"
	if e.LastGood != 0 {
		good = fmt.Sprintf("the last good revision is %d", e.LastGood)
	}
	switch {
	case e.First == 0 && e.Last == 0:
		return good + ", what is missing is not known"
	case e.First == 0:
		return fmt.Sprintf("%s, any of revisions 1 to %d may be missing", good, e.Last)
	case e.Last == 0:
		return fmt.Sprintf("%s, from %d on it is not known how many are missing", good, e.First)
	case e.First == e.Last:
		return fmt.Sprintf("%s, revision %d is missing", good, e.First)
	}
	return fmt.Sprintf("%s, revisions %d to %d are missing", good, e.First, e.Last)
}
