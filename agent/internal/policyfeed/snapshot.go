// What decides on the node, as of one moment: the active policy, a candidate beside
// it, and whose calls that decides. A decision is made by one snapshot, so it is of
// one generation, and records which.

package policyfeed

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/engine"
)

// Snapshot is immutable. The zero value decides nothing.
type Snapshot struct {
	// Active is nil where there is no policy yet, Candidate where none is tried.
	Active, Candidate *engine.Engine
	// Step is that of the candidate; what is counted is of one.
	Step uint32
	// Version is another number for each snapshot, and rises; Since is when it was
	// swapped in.
	Version uint64
	Since   time.Time

	rollout rollout
}

// rollout is where a candidate decides, as it is kept on disk. The zero value is
// nowhere.
type rollout struct {
	Step         uint32   `json:"step"`
	Destinations []string `json:"destinations,omitempty"` // sorted
	PerMille     uint32   `json:"per_mille,omitempty"`
}

// rolloutOf reads an announcement. A stage that is not known here decides nothing.
func rolloutOf(pb *capb.PolicyCandidate) rollout {
	r := rollout{Step: pb.GetStep()}
	if pb.GetStage() == capb.PolicyStage_POLICY_STAGE_CANARY {
		r.Destinations, r.PerMille = slices.Sorted(slices.Values(pb.GetCanary().GetDestinations())), pb.GetCanary().GetPerMille()
	}
	return r
}

// Generations are those of the active policy and of the candidate; 0 for none.
func (s *Snapshot) Generations() (active, candidate uint64) {
	return generationOf(s.Active), generationOf(s.Candidate)
}

// Choice is who decides the calls to one destination.
type Choice struct {
	// Decides is nil where there is no policy. Beside is to be compared with it, and
	// decides nothing; nil where no candidate is tried.
	Decides, Beside *engine.Engine
	// Canary: Decides is the candidate, and Beside the active policy.
	Canary bool
}

// For says who decides the calls to destination on the node of agent, a SPIFFE ID.
func (s *Snapshot) For(agent, destination string) Choice {
	switch {
	case s.Candidate == nil || s.Active == nil:
		return Choice{Decides: s.Active}
	case s.rollout.covers(agent, destination):
		return Choice{Decides: s.Candidate, Beside: s.Active, Canary: true}
	}
	return Choice{Decides: s.Active, Beside: s.Candidate}
}

func (r *rollout) covers(agent, destination string) bool {
	if _, named := slices.BinarySearch(r.Destinations, destination); named {
		return true
	}
	return r.PerMille > 0 && share(agent, destination) < r.PerMille
}

// share places a pair of agent and destination among a thousand, always alike: a pair
// that is in a share is in every larger one.
func share(agent, destination string) uint32 {
	sum := sha256.Sum256([]byte(agent + "\x00" + destination))
	return uint32(uint64(binary.BigEndian.Uint32(sum[:4])) * 1000 >> 32)
}
