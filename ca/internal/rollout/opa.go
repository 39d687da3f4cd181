package rollout

// This file is what stock OPAs say of policy, which no agent speaks for.

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// OPA is a stock OPA. All but Uploader and HeardAt is its own word.
type OPA struct {
	Uploader string            `json:"uploader"` // who proved to be
	Instance string            `json:"instance"`
	Labels   map[string]string `json:"labels,omitempty"`
	Active   uint64            `json:"active,omitempty"`
	Fault    string            `json:"fault,omitempty"`
	HeardAt  time.Time         `json:"heard_at"`
}

const (
	// maxLabelBytes is how much is kept of an OPA's labels, names and values.
	maxLabelBytes = 256
	// maxSharedOPAs is how many a share has.
	maxSharedOPAs = 200
)

// Hear puts the first of opas into s, laggards first as MergeOPAs sorts them. When each
// was heard is told to the minute, so that s does not change with every word of theirs.
func (s *Share) Hear(opas []OPA) {
	s.OPAs = slices.Clone(opas[:min(len(opas), maxSharedOPAs)])
	for i := range s.OPAs {
		s.OPAs[i].HeardAt = s.OPAs[i].HeardAt.Truncate(time.Minute)
	}
}

// LabelsOf are those of all that are to be kept, the first by name as far as there is
// room; "id" is the instance.
func LabelsOf(all map[string]string) map[string]string {
	kept, room := map[string]string{}, maxLabelBytes
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if size := len(name) + len(all[name]); name != "id" && size <= room {
			kept[name] = all[name]
			room -= size
		}
	}
	return kept
}

// MergeOPAs are those of own and of others' shares that have been heard since, each
// once, as it was heard last: those behind generation first.
func MergeOPAs(generation uint64, own []OPA, others []*Share, since time.Time) []OPA {
	type key struct{ uploader, instance string }
	last := map[key]OPA{}
	take := func(o OPA) {
		k := key{o.Uploader, o.Instance}
		if known, ok := last[k]; !o.HeardAt.Before(since) && (!ok || known.HeardAt.Before(o.HeardAt)) {
			last[k] = o
		}
	}
	for _, o := range own {
		take(o)
	}
	for _, s := range others {
		for _, o := range s.OPAs {
			take(o)
		}
	}
	all := make([]OPA, 0, len(last))
	for _, o := range last {
		all = append(all, o)
	}
	slices.SortFunc(all, func(a, b OPA) int {
		return cmp.Or(behind(a, generation)-behind(b, generation), cmp.Compare(a.Uploader, b.Uploader), cmp.Compare(a.Instance, b.Instance))
	})
	return all
}

// behind orders those that lag, or say what is wrong, before the others.
func behind(o OPA, generation uint64) int {
	if o.Active < generation || o.Fault != "" {
		return 0
	}
	return 1
}
