// What a replica writes down for the others.

package rollout

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"merlon.dev/ca/internal/store"
	"merlon.dev/policy/comparison"
)

// SharePrefix is where the store keeps shares, by bundle and replica.
const SharePrefix = "policy/share/"

const (
	encodingVersion = 1
	// Bounds of what one share names, which keep its value small.
	maxSharedPoints      = 500
	maxSharedProcesses   = 16 // of each point
	maxSharedSites       = 500
	maxSharedDifferences = 200
)

// Share is what one replica knows of one bundle.
type Share struct {
	// Bundle and Replica are in the key.
	Bundle  string `json:"-"`
	Replica string `json:"-"`

	Version int      `json:"v"`
	Trial   Trial    `json:"trial"`
	Sites   []site   `json:"sites,omitempty"`
	Differ  []differ `json:"differences,omitempty"`
	Dropped uint64   `json:"dropped,omitempty"`
	// Points are its agents, laggards first; Unnamed is how many there are beside.
	Points  []Point `json:"points,omitempty"`
	Unnamed int     `json:"unnamed,omitempty"`
	// OPAs are those that it has heard of late, laggards first.
	OPAs []OPA `json:"opas,omitempty"`
}

type site struct {
	comparison.Site
	comparison.Counts
}

type differ struct {
	comparison.Difference
	Calls uint64
}

// NewShare puts a share together: points follow the bundle, of which generation is in
// force.
func NewShare(bundle, replica string, generation uint64, trial Trial, r comparison.Report, points []Point) *Share {
	s := &Share{Bundle: bundle, Replica: replica, Version: encodingVersion, Trial: trial, Dropped: r.Dropped}
	for k, c := range r.Sites {
		s.Sites = append(s.Sites, site{k, c})
	}
	slices.SortFunc(s.Sites, func(a, b site) int { return strings.Compare(a.Destination, b.Destination) })
	s.Sites = s.Sites[:min(len(s.Sites), maxSharedSites)]
	for k, n := range r.Differences {
		s.Differ = append(s.Differ, differ{k, n})
	}
	slices.SortFunc(s.Differ, func(a, b differ) int { return cmp.Compare(b.Calls, a.Calls) })
	for _, d := range s.Differ[min(len(s.Differ), maxSharedDifferences):] {
		s.Dropped += d.Calls
	}
	s.Differ = s.Differ[:min(len(s.Differ), maxSharedDifferences)]
	points = slices.Clone(points)
	laggardsFirst(points, generation)
	s.Unnamed = max(0, len(points)-maxSharedPoints)
	s.Points = points[:min(len(points), maxSharedPoints)]
	for i := range s.Points {
		p := &s.Points[i]
		n := min(len(p.Processes), maxSharedProcesses)
		p.Unnamed += len(p.Processes) - n
		p.Processes = p.Processes[:n]
	}
	return s
}

// counts is what s says of trial; s may be nil.
func (s *Share) counts(trial Trial) comparison.Report {
	var r comparison.Report
	if s == nil || s.Trial != trial {
		return r
	}
	r.Sites, r.Differences, r.Dropped = map[comparison.Site]comparison.Counts{}, map[comparison.Difference]uint64{}, s.Dropped
	for _, k := range s.Sites {
		r.Sites[k.Site] = k.Counts
	}
	for _, d := range s.Differ {
		r.Differences[d.Difference] = d.Calls
	}
	return r
}

// Put is the write of s.
func (s *Share) Put() (store.Op, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return store.Op{}, fmt.Errorf("encode what is known of policy bundle %s: %w", s.Bundle, err)
	}
	return store.Put(SharePrefix+s.Bundle+"/"+s.Replica, b), nil
}

// DecodeShare reads a stored share.
func DecodeShare(kv store.KV) (*Share, error) {
	s := &Share{}
	if err := json.Unmarshal(kv.Value, s); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if s.Version != encodingVersion {
		return nil, fmt.Errorf("decode %s: version %d is not known", kv.Key, s.Version)
	}
	var ok bool
	if s.Bundle, s.Replica, ok = strings.Cut(strings.TrimPrefix(kv.Key, SharePrefix), "/"); !ok {
		return nil, fmt.Errorf("decode %s: no replica is named", kv.Key)
	}
	return s, nil
}
