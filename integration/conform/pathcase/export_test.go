package pathcase

import "iter"

// Requirements gives the keys of requirements.
func Requirements() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for id, r := range requirements {
			if !yield(id, r) {
				return
			}
		}
	}
}
