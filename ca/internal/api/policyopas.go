// Stock OPAs in the status of policy: what they send to the status sink, by which
// generation each decides, and who lags.

package api

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/report"
	"merlon.dev/ca/internal/rollout"
)

// maxListedOPAs bounds the OPAs in one answer, which name themselves as they like.
const maxListedOPAs = 1000

// HeardOPA says that an OPA has sent its status: other replicas are to know.
func (s *Service) HeardOPA() { s.rollout.Dirty() }

// ownOPAs are those that this replica has heard of late, of the bundle of h.
func (s *Service) ownOPAs(h *release.Head, now time.Time) []rollout.OPA {
	if s.opts.Statuses == nil {
		return nil
	}
	var own []rollout.OPA
	for _, in := range s.opts.Statuses.Instances(now) {
		if b, ok := in.Of(h.Name); ok {
			own = append(own, opaOf(&in, &b))
		}
	}
	return rollout.MergeOPAs(h.Generation, own, nil, time.Time{})
}

func opaOf(in *report.Instance, b *report.BundleStatus) rollout.OPA {
	o := rollout.OPA{Uploader: in.Uploader, Instance: in.ID, Labels: rollout.LabelsOf(in.Labels), HeardAt: in.Received.UTC()}
	if b.Code != "" || b.Message != "" {
		o.Fault = strings.TrimPrefix(b.Code+": "+b.Message, ": ")
	}
	if b.Revision == "" {
		return o
	}
	generation, err := strconv.ParseUint(b.Revision, 10, 64)
	if err != nil {
		o.Fault = fmt.Sprintf("its bundle %q is of revision %.40q, which is no generation; %s", b.Name, b.Revision, o.Fault)
	}
	o.Active = generation
	return o
}

// opasToProto are the OPAs of h, and how many are left out.
func (s *Service) opasToProto(h *release.Head, others []*rollout.Share, now time.Time) (points []*capb.PolicyPoint, leftOut int) {
	all := rollout.MergeOPAs(h.Generation, s.ownOPAs(h, now), others, now.Add(-report.ForgetAfter))
	for _, o := range all[:min(len(all), maxListedOPAs)] {
		p := &capb.PolicyPoint{
			Kind: "opa", Connected: true, Generation: o.Active, Fault: o.Fault,
			Uploader: o.Uploader, Instance: o.Instance, Labels: o.Labels, HeardAt: timestamp(o.HeardAt),
		}
		if strings.HasPrefix(o.Uploader, "spiffe://") {
			p.SpiffeId = o.Uploader
		}
		if since := rollout.Since(h, o.Active); !since.IsZero() {
			p.LaggingSince = timestamp(since)
		}
		points = append(points, p)
	}
	return points, len(all) - len(points)
}
