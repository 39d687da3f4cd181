// Command planted calls a function with a known vulnerability, GO-2022-1059, for the
// gate to find. Nothing runs it.
package main

import (
	"fmt"
	"os"

	"golang.org/x/text/language"
)

func main() {
	fmt.Println(language.ParseAcceptLanguage(os.Args[1]))
}
