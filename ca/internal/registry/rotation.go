// The authorities in the picture, and by whom their next steps are judged: every
// agent with what it acknowledged, every replica with its intermediates.

package registry

import (
	"cmp"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/rotation"
)

// Authorities are those of the trust domain.
func (r *Registry) Authorities() rotation.Set { return r.pic.Load().authorities }

// StepsTaken returns a channel that is closed with the next step of an
// authority.
func (r *Registry) StepsTaken() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.steps
}

// Viewer is who looks.
type Viewer struct {
	// Replica is its name; of itself it does not need to hear.
	Replica string
	// X509SVID and JWTSVID are what SVIDs live whose entry does not say.
	X509SVID, JWTSVID time.Duration
}

// Rotation returns the authorities and the view of one picture.
func (r *Registry) Rotation(now time.Time, by Viewer) (rotation.Set, rotation.View) {
	pic := r.pic.Load()
	return pic.authorities, rotation.View{Agents: pic.counted(now, by), Issuers: pic.issuers(now), Silent: pic.replicas.unheard(by.Replica)}
}

func (p *picture) counted(now time.Time, defaults Viewer) []rotation.Agent {
	banned := make(map[string]uint64) // agent → revision of its latest ban
	for _, rec := range p.revocations.After(0, now) {
		if rec.AgentID != "" && !rec.Imported { // an agent of that name below another CA is another
			banned[rec.AgentID] = max(banned[rec.AgentID], rec.Revision)
		}
	}
	agents := make([]rotation.Agent, 0, p.agents.Len())
	for _, a := range p.agents.All() {
		counted := rotation.Agent{Name: a.ID.String(), Sequence: a.TrustSequence, Since: a.TrustSince, Until: a.NotAfter}
		counted.Banned = a.Standing == attest.Banned || banned[counted.Name] > a.AttestedRevision
		if !now.Before(a.NotAfter) { // what its workloads got last may live on
			counted.Until = a.NotAfter.Add(p.longestTTL(a.ID, defaults))
		}
		agents = append(agents, counted)
	}
	return append(agents, p.countedBelow()...)
}

// countedBelow are the nested CAs as agents count: each with those below it that
// hold it back, until the last SVID under it has expired.
func (p *picture) countedBelow() (all []rotation.Agent) {
	for name, progress := range p.replicas.progress {
		rec, ok := p.replicas.byName[name]
		if !ok {
			continue
		}
		until := rec.Current().NotAfter.Add(entry.MaxJWTSVIDTTL)
		for _, agent := range progress.Behind {
			all = append(all, rotation.Agent{Name: agent + " below nested CA " + name, Sequence: progress.TrustSequence, Until: until})
		}
		if len(progress.Behind) == 0 {
			all = append(all, rotation.Agent{Name: "nested CA " + name, Sequence: progress.TrustSequence, Until: until})
		}
	}
	return all
}

// longestTTL is what an SVID that was issued through the agent can live: what
// was issued for an entry that is gone is revoked, or ended with it.
func (p *picture) longestTTL(agent spiffeid.ID, defaults Viewer) time.Duration {
	var longest time.Duration
	for e := range p.entries.below(agent) {
		longest = max(longest, cmp.Or(e.X509SVIDTTL, defaults.X509SVID), cmp.Or(e.JWTSVIDTTL, defaults.JWTSVID))
	}
	return longest
}

// issuers are the intermediates that have not ended.
func (p *picture) issuers(now time.Time) (all []rotation.Issuer) {
	first := "" // of the older records, which do not name their root
	for _, a := range p.authorities.All() {
		if a.Kind == rotation.Root {
			first = a.ID
			break
		}
	}
	for _, rec := range p.replicas.byName {
		for _, a := range rec.Authorities {
			if current := a.ID == rec.Current().ID; current || now.Before(a.NotAfter) {
				all = append(all, rotation.Issuer{Replica: rec.Name, ID: a.ID, Root: cmp.Or(a.Root, first), NotAfter: a.NotAfter, Current: current})
			}
		}
	}
	return all
}

// AckDue says whether the agent's record should say that it serves the trust
// bundle of this sequence: where a step may wait for it, or it went back.
func (r *Registry) AckDue(id spiffeid.ID, sequence uint64) bool {
	pic := r.pic.Load()
	a := pic.agent(id)
	if a == nil || a.TrustSequence == sequence {
		return false
	}
	return sequence < a.TrustSequence || a.TrustSequence < pic.awaited()
}

// awaited is the highest sequence that some step may wait for.
func (p *picture) awaited() (sequence uint64) {
	for _, a := range p.authorities.All() {
		if a.State == rotation.Published || a.State == rotation.Tainted {
			sequence = max(sequence, a.Sequence)
		}
	}
	return sequence
}
