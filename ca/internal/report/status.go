package report

// This file keeps what each instance said of itself last. It is this replica's
// memory, and bounded: who lags is asked now, not after a restart.

import (
	"cmp"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"time"
)

// Bounds of what is kept: of one instance, of all of one uploader, and of all.
const (
	maxBundles     = 16
	maxLabels      = 16
	maxText        = 256
	maxMessage     = 512
	maxPerUploader = 1024
	maxInstances   = 4096
	// ForgetAfter is how long an instance is known that says nothing more. An OPA says
	// something with each poll for its bundles, every 2 minutes at the latest unless
	// configured otherwise. One that is gone must not lag for long.
	ForgetAfter = 10 * time.Minute
)

// Instance is one enforcement point, as it said itself.
type Instance struct {
	// Uploader is who proved to be: a SPIFFE ID, or the holder of a bundle-reader
	// token. All else is the uploader's word.
	Uploader string
	// PolicyBundle is the one that the uploader's token is for; empty for an SVID.
	PolicyBundle string
	// ID is the instance's own, its label "id".
	ID       string
	Labels   map[string]string
	Bundles  []BundleStatus // sorted by name
	Received time.Time
}

// BundleStatus is one policy bundle at one instance. Name is what the instance
// calls it.
type BundleStatus struct {
	Name string
	// Revision is that of the active bundle; Merlon's are numbers, the generations.
	// Empty: none is active.
	Revision  string
	Activated time.Time // when that became active, or was found to be so again
	Requested time.Time // when the instance asked last for another
	// Code and Message say why that failed; empty when it did not.
	Code, Message string
}

// statusUpdate is the part of OPA's status message that is kept.
type statusUpdate struct {
	Labels  map[string]string        `json:"labels"`
	Bundles map[string]*bundleUpdate `json:"bundles"`
}

type bundleUpdate struct {
	ActiveRevision           string    `json:"active_revision"`
	LastSuccessfulActivation time.Time `json:"last_successful_activation"`
	LastRequest              time.Time `json:"last_request"`
	Code                     string    `json:"code"`
	Message                  string    `json:"message"`
}

// ParseStatus reads an OPA's status message. Errors are of type *InvalidError.
func ParseStatus(body []byte) (Instance, error) {
	var m statusUpdate
	if err := json.Unmarshal(body, &m); err != nil {
		return Instance{}, invalid("the status is not as an OPA sends it: %v", err)
	}
	if err := checkLabels(m.Labels); err != nil {
		return Instance{}, err
	}
	if m.Labels["id"] == "" {
		return Instance{}, invalid(`the status has no label "id", which tells instances apart`)
	}
	if len(m.Bundles) > maxBundles {
		return Instance{}, invalid("the status has %d bundles; at most %d are kept", len(m.Bundles), maxBundles)
	}
	in := Instance{ID: m.Labels["id"], Labels: m.Labels}
	for name, b := range m.Bundles {
		switch {
		case b == nil:
			continue
		case len(name) > maxText || len(b.ActiveRevision) > maxText || len(b.Code) > maxText:
			return Instance{}, invalid("a name, revision or code of a bundle has more than %d bytes", maxText)
		}
		in.Bundles = append(in.Bundles, BundleStatus{
			Name: name, Revision: b.ActiveRevision, Activated: b.LastSuccessfulActivation, Requested: b.LastRequest,
			Code: b.Code, Message: strings.ToValidUTF8(b.Message[:min(len(b.Message), maxMessage)], ""),
		})
	}
	slices.SortFunc(in.Bundles, func(a, b BundleStatus) int { return cmp.Compare(a.Name, b.Name) })
	return in, nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return invalid("there are %d labels; at most %d are kept", len(labels), maxLabels)
	}
	for name, value := range labels {
		if len(name) > maxText || len(value) > maxText {
			return invalid("the label %.40q has more than %d bytes", name, maxText)
		}
	}
	return nil
}

// Of is the instance's status of the policy bundle called name: what it calls so, or,
// where its token is for that bundle, the only one that it has. False where it has none.
func (in *Instance) Of(name string) (BundleStatus, bool) {
	if in.PolicyBundle != "" && in.PolicyBundle != name {
		return BundleStatus{}, false
	}
	for _, b := range in.Bundles {
		if b.Name == name || in.PolicyBundle == name && len(in.Bundles) == 1 {
			return b, true
		}
	}
	return BundleStatus{}, false
}

// Statuses has the last status of each instance. The zero value is empty and
// ready; it is safe for concurrent use.
type Statuses struct {
	mu sync.Mutex
	// guarded by mu
	by map[instanceKey]Instance
}

type instanceKey struct{ uploader, id string }

// Put keeps what in says of itself, in place of what it said before. It reports
// false where there is no room for another: one uploader crowds out its own
// instances, and never another's.
func (s *Statuses) Put(in Instance) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := instanceKey{in.Uploader, in.ID}
	if _, known := s.by[key]; !known && !s.makeRoom(in) {
		return false
	}
	if s.by == nil {
		s.by = make(map[instanceKey]Instance)
	}
	s.by[key] = in
	return true
}

// makeRoom forgets who has been silent for long, and the oldest of in's uploader if
// that has too many. s.mu is held.
func (s *Statuses) makeRoom(in Instance) bool {
	own, oldest := 0, instanceKey{}
	for key, other := range s.by {
		switch {
		case in.Received.Sub(other.Received) > ForgetAfter:
			delete(s.by, key)
		case key.uploader == in.Uploader:
			if own++; own == 1 || other.Received.Before(s.by[oldest].Received) {
				oldest = key
			}
		}
	}
	if own >= maxPerUploader {
		delete(s.by, oldest)
	}
	return len(s.by) < maxInstances
}

// Instances are all that have said something of late at now, by uploader and ID. They
// are the caller's to sort, and not to write to.
func (s *Statuses) Instances(now time.Time) []Instance {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Instance, 0, len(s.by))
	for _, in := range s.by {
		if now.Sub(in.Received) <= ForgetAfter {
			all = append(all, in)
		}
	}
	slices.SortFunc(all, func(a, b Instance) int {
		return cmp.Or(cmp.Compare(a.Uploader, b.Uploader), cmp.Compare(a.ID, b.ID))
	})
	return all
}
