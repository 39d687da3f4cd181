// Which tokens may come back with a backup.

package attest

import "strings"

// SingleUse says whether key is that of a token that ends with its first use:
// every kind but bundle-reader tokens, and what says that another's token was used.
// A backup brings it back unused.
func SingleUse(key string) bool {
	return strings.HasPrefix(key, TokenPrefix) && !strings.HasPrefix(key, TokenPrefix+readerKind+"/") && !strings.HasPrefix(key, TokenPrefix+usedKind+"/")
}
