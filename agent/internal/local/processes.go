// The processes that decide by compiled policy, as they say themselves, and what the
// CA is told of the policy on this node.

package local

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/policyfeed"
	"merlon.dev/ca/capb"
)

// maxProcesses is how many processes are named to the CA.
const maxProcesses = 256

// process is one that reports. Its stream is what tells it from others.
type process struct {
	spiffeID   string
	pid        int32
	version    uint64 // of the policy, as it said last; 0: it says nothing of it
	generation uint64
	lagging    time.Time // since when; zero: it does not
}

// processes is safe for concurrent use.
type processes struct {
	mu   sync.Mutex
	live map[*process]struct{} // guarded by mu, and so are the fields of each
	last *capb.PolicyReport    // told last, without counts; guarded by mu
}

func newProcesses() *processes { return &processes{live: map[*process]struct{}{}} }

func (ps *processes) add(p *process) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.live[p] = struct{}{}
}

func (ps *processes) remove(p *process) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	delete(ps.live, p)
}

// heard notes what p says of itself, and whether that is new.
func (ps *processes) heard(p *process, pid int32, spiffeID string, m *agentpb.ReportRequest) bool {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	before := *p
	p.pid, p.spiffeID = pid, spiffeID
	if m.GetPolicyVersion() != 0 {
		p.version, p.generation = m.GetPolicyVersion(), m.GetPolicyGeneration()
	}
	return *p != before
}

// list names the processes, those that lag behind s first.
func (ps *processes) list(s *policyfeed.Snapshot) (named []*capb.PolicyProcess, total int) {
	for p := range ps.live {
		if p.version == 0 {
			continue
		}
		total++
		switch {
		case p.version == s.Version:
			p.lagging = time.Time{}
		case p.lagging.IsZero():
			p.lagging = s.Since
		}
		pb := &capb.PolicyProcess{SpiffeId: p.spiffeID, Pid: p.pid, Generation: p.generation}
		if !p.lagging.IsZero() {
			pb.LaggingSince = timestamppb.New(p.lagging)
		}
		named = append(named, pb)
	}
	slices.SortFunc(named, func(a, b *capb.PolicyProcess) int {
		behind := func(p *capb.PolicyProcess) int {
			if p.GetLaggingSince() != nil {
				return 0
			}
			return 1
		}
		return cmp.Or(behind(a)-behind(b), cmp.Compare(a.GetSpiffeId(), b.GetSpiffeId()), cmp.Compare(a.GetPid(), b.GetPid()))
	})
	return named[:min(len(named), maxProcesses)], total
}

// ReportDue receives when PolicyReport has something new.
func (s *Server) ReportDue() <-chan struct{} { return s.compared.due }

// PolicyChanged is to be called when the policy of the node did: the CA is told.
func (s *Server) PolicyChanged() { s.compared.wake() }

// PolicyReport is what the CA has to be told since the last time; nil for nothing.
// whole repeats what it was told before, but for counts. One caller at a time.
func (s *Server) PolicyReport(whole bool) *capb.PolicyReport {
	snapshot := s.o.Policy()
	_, candidate := snapshot.Generations()
	m := &capb.PolicyReport{Name: s.o.PolicyName, CandidateGeneration: candidate, Fault: s.o.PolicyFault()}
	s.processes.mu.Lock()
	named, total := s.processes.list(snapshot)
	m.Processes, m.ProcessCount = named, uint32(total)
	unchanged := !whole && proto.Equal(m, s.processes.last)
	s.processes.last = m
	s.processes.mu.Unlock()
	s.told = s.compared.take()
	if s.told.report.Empty() {
		if unchanged {
			return nil
		}
		return m
	}
	m = proto.CloneOf(m)
	m.Counts = s.told.toPB()
	return m
}

// NotReported takes in again the counts of the last PolicyReport, which was not sent.
func (s *Server) NotReported() { s.compared.giveBack(s.told) }

func (c *counted) toPB() *capb.PolicyCounts {
	pb := &capb.PolicyCounts{CandidateGeneration: c.generation, Step: c.step, DifferencesDropped: c.report.Dropped}
	for site, n := range c.report.Sites {
		pb.Comparisons = append(pb.Comparisons, &capb.PolicyComparison{
			Destination: site.Destination, Canary: site.Canary,
			BothAllow: n.BothAllow, BothDeny: n.BothDeny, WouldAllow: n.WouldAllow, WouldDeny: n.WouldDeny,
		})
	}
	for d, n := range c.report.Differences {
		pb.Differences = append(pb.Differences, &capb.PolicyDifference{
			Source: d.Source, Destination: d.Destination, Reason: string(d.Reason), RuleId: d.RuleID,
			CandidateReason: string(d.CandidateReason), CandidateRuleId: d.CandidateRuleID, CandidateAllows: d.CandidateAllows, Calls: n,
		})
	}
	return pb
}
