"""Hand graphs, engines and checkpoints over to other programs, in the trees and under the names that these read."""
