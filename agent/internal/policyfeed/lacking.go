// Shares that lack a service of the node. Entries come and go at the CA and here a
// moment apart, so while they keep changing some share or other always lacks one; that
// must not keep a policy from being in force for all the others.

package policyfeed

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"merlon.dev/policy/engine"
)

// patience is how long a share may lack a service that is on the node before that is a
// fault. It is asked for again meanwhile, and calls to the service are denied.
const patience = 5 * time.Second

// lackingError reports a share that was loaded, and is not for every destination.
type lackingError struct {
	generation   uint64
	destinations []string // at least one
}

func (e *lackingError) Error() string {
	return fmt.Sprintf("the CA's share of generation %d for this node has nothing about %s yet", e.generation, e.destinations[0])
}

// covers says which destinations e lacks that were on the node when it was asked for,
// and are there still.
func (f *Feed) covers(want *announcement, e *engine.Engine) error {
	lacking := slices.DeleteFunc(f.cfg.Destinations(), func(d string) bool { return e.For(d) || !slices.Contains(want.destinations, d) })
	if len(lacking) == 0 {
		return nil
	}
	return &lackingError{e.Generation(), lacking}
}

// faults are those of errs that are faults. Shares that lack a destination are none
// within patience.
func (f *Feed) faults(errs ...error) error {
	before, now := f.lacks, time.Now()
	f.lacks = make(map[string]time.Time)
	for i, err := range errs {
		lacking, ok := errors.AsType[*lackingError](err)
		if !ok {
			continue
		}
		errs[i] = nil
		for _, d := range lacking.destinations {
			since, known := before[d]
			if !known {
				since = now
			}
			if f.lacks[d] = since; now.Sub(since) >= patience {
				errs[i] = err
			}
		}
	}
	return errors.Join(errs...)
}
