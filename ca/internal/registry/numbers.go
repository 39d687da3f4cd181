// The numbers by which others tell an old picture from a new one.

package registry

// Numbers are those of one picture: its revision, the sequence number of the
// trust bundle, and the highest generation of any policy bundle; 0 where there
// is none.
func (r *Registry) Numbers() (revision, trustSequence, generation uint64) {
	pic := r.pic.Load()
	if pic.trust != nil {
		trustSequence = pic.trust.Sequence
	}
	for _, h := range pic.heads {
		generation = max(generation, h.Generation)
	}
	return pic.revision, trustSequence, generation
}
